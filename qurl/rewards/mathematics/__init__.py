"""Equality of mathematical answers, with bounded effort.

    text --latex.canonical--> LaTeX --shapes.read--> Shape (numbers, tuples, sets, relations, words)
                                                       |  leaves: expressions.parse -> Node
    two shapes --compare.same--> by parts; two leaves --values.same_value--> exact fractions, else numeric values at a few points

SymPy solves nothing here: two expressions are equal where they have equal values, to 30 digits and more, at points chosen for their
symbols. That is quick, cannot run away, and tells M from m. What this reader does not know (sums, integrals, limits) goes to
math-verify, under a limit of CPU time (`limit`)."""
