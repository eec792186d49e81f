"""The registered ops: schema, fake and vmap rule of each, the reference that defines its result."""
