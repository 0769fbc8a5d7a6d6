"""Fast arithmetic of formats, one package per kind of device; nothing imports them but what chooses a kernel for a layer,
and Ax-BxP for its lookups."""
