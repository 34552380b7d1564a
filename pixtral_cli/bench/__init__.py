"""`pixtral bench`: a model in, its rates out, beside what this machine allows and what other programs reach.

`shapes` and `random_weights` make a model that needs no download, `model_files` writes it as each program reads it,
`contender` is a process with one program in it, `ceilings` measures the machine, `counts` says how much a work has to
read and to multiply, and `runs` has the order of it all. `report` shows what was found.
"""
