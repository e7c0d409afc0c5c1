"""How many blocks the tiny Flux has: enough of each kind for a first, a last and some in between."""

DOUBLES, SINGLES = 4, 6
