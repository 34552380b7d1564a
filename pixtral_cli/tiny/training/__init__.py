"""Training of the built-in model. It is in the repository, but not in the installed package.

`python -m pixtral_cli.tiny.training.train --out runs/tiny --minutes 110` trains, and continues where it stopped.
`python -m pixtral_cli.tiny.training.write_weights runs/tiny` writes the result into `pixtral_cli/tiny/weights`.
"""
