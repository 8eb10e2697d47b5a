"""Decisions that are made before a weight is read.

make_plan       decide format, shape, rotary slots and precision of a conversion
shape           choose the widths of an export from the cache ratio or from explicit settings
freqfold        choose how many neighbouring rotary frequencies are concentrated together
fit_settings    settings of the fit that follows each layer's closed-form factors
estimate        memory, disk space, time and cache size of a conversion and its export
family_table    which model families convert, and to which format
"""
