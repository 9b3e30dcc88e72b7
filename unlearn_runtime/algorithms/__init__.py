"""How each method is carried out: one file a method, under the name it has in ``rdp_calc.methods``."""
