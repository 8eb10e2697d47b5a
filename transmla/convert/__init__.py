"""The conversion: one pass over the source's layers, with one or two decoder layers in memory at a time.

pipeline            ``convert``: run a conversion from end to end, and resume one that was interrupted
prepare             decide everything from the recipe before a weight is read
room                whether memory and disk have room, and what would fit
memory              compare the memory that is needed with what is free
resume              whether a folder of an earlier run can be continued
calibration_text    read the mixture of texts, sample the model, check lengths
choose_budget       the smallest cache that keeps to a loss
layer_costs         what each size of a layer costs, for this choice
held_rows           calibration text that chooses or checks instead of calibrating
layers              convert one decoder layer after the other
phases              how long each phase of the layers takes
relative_error      the error of a layer's attention, for the manifest
source_layer        run one source layer over the calibration text
observe             measure its statistics meanwhile
sensitivity_meter   how much an error on each key and value changes the attention's output
eps_correction      the factor on a norm's weight that corrects for a changed eps
finite              refuse numbers that overflow, before a shard is written from them
shard_writer        write shards in a thread, and the state for a resume
streams             the hidden states that are carried from layer to layer
factorize           factor a layer's weights in closed form
fit_layers          fit the factors of a few layers to the source's layers
fit_inputs          new inputs for a fit from little calibration text
fit_steps           the steps of a fit, on one or several processes
step_parts          what one of several processes computes of a step
fit_vector          the parameters of a fit, as one scaled vector that processes divide
side_stream         run the source beside the export on a GPU
deterministic       restrict PyTorch to deterministic kernels
finish              write the files that follow the layers
inspect             measure a source before it is converted
"""
