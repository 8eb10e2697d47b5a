"""Model families, one file each; a file that defines ``FAMILY`` is found by its presence."""
