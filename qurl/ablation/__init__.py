"""Which part of the correction does what: the same recipe under several arms, formats and seeds, on one page. Needs no reader but a
person; `qurl ablation` starts it."""
