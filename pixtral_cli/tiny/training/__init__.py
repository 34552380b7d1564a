"""How the built-in model is trained. It is in the repository and not in the package that people install.

`python -m pixtral_cli.tiny.training.train --out runs/tiny --minutes 110` trains, and goes on where it stopped;
`python -m pixtral_cli.tiny.training.write_weights runs/tiny` writes the result into `pixtral_cli/tiny/weights`.
"""
