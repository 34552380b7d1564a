"""What a shell offers on Tab: a program's commands and flags in, a script for each shell out. Knows no single flag."""
