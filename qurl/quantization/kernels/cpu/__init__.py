"""C++ for CPUs, compiled when it is first used.

    library  compile once per user, load, find torch's threads
    lobcq    LO-BCQ linear layers with weights that stay packed
    int8     INT8 linear layers, and those of Ax-BxP with weights that stay packed
    lookup   INT8 codes in tables, for Ax-BxP"""
