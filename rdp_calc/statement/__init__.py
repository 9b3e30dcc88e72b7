"""The guarantee of a certificate in plain words, as text, Markdown or one printable page."""

from rdp_calc.statement.content import statement_of
from rdp_calc.statement.document import HEADLINE, STATEMENT_SCHEMA, Odds, Statement
from rdp_calc.statement.page import to_html
from rdp_calc.statement.text import to_markdown, to_text

__all__ = ["HEADLINE", "STATEMENT_SCHEMA", "Odds", "Statement", "statement_of", "to_html", "to_markdown", "to_text"]
