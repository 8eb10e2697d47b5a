"""Checks of a model's files before any library reads them.

named      whether a name is a local path or a model of the Hub; nothing is read
folder     links, pipes, pointers of git-lfs, indices, adapters, pickled weights
headers    names and shapes of the tensors, from the headers of safetensors files
config     the numbers of config.json against those names and shapes
"""
