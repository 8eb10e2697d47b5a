"""Decisions that are made before a weight is read.

make_plan       decide format, shape, rotary slots and precision of a conversion
shape           choose the widths of an export from the cache ratio or from explicit settings
shape_ladder    the shapes to choose from when the user gives a loss instead of a size
allocate        divide one cache among layers
freqfold        choose how many neighbouring rotary frequencies are concentrated together
fit_settings    settings of the fit that follows each layer's closed-form factors
estimate        memory and disk space of a conversion, and cache size of its export
estimate_time   time of a conversion and of its healing
family_table    which model families convert, and to which format
"""
