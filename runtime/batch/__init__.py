"""`latentrt batch`: the requests of a file, drawn to a folder, which any kill only interrupts."""
