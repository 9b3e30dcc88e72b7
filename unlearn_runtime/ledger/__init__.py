"""The deletion ledger of one model: an append-only, hash-chained SQLite file, and what reads and writes it.

Nothing here imports torch but ``running``, which carries a planned release out.
"""
