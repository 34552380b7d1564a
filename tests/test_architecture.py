"""Who may import whom, as ARCHITECTURE.md draws it: the arrows run down, never back up and never around."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Names and failures, which know nothing but each other.
SHARED = {"errors", "encoding_choices", "devices", "known_models"}
MAY_IMPORT = {
    "__main__": {"cli.main", "process_environment"},
    "cli.main": {"cli", "commands", "weights_cache"},
    "commands": {"bench", "cli", "prompt", "server", "source", "weights_cache"},
    "cli": {"api", "generation", "generation_options", "prompt", "weights_cache"},
    "server": {"api", "engine", "generation", "generation_options", "prompt"},
    "bench": {"api", "engine", "model", "process_environment", "source", "tiny", "weights_cache"},
    "api": {"constraints", "generation", "generation_options", "source", "engine", "model", "prompt"},
    "generation": {"constraints", "generation_options", "engine", "prompt"},
    "generation_options": {"engine"},
    "constraints": {"engine", "generation_options", "prompt"},
    "source": {"model", "prompt", "tiny", "weights_cache"},
    "tiny.evaluate": {"api", "tiny"},
    "tiny": {"model"},
    "engine": {"model"},
    "model": {"weights_cache"},
    "__init__": set(),
    "prompt": {"weights_cache"},
    "process_environment": set(),
    "weights_cache": set(),
    **{name: set() for name in SHARED},
    "encoding_choices": {"weights_cache"},
}


def room(parts):
    """The room of pixtral_cli.engine.engine is `engine`, unless a longer name has a row; pixtral_cli's own is `api`."""
    if parts[0] == "weights_cache":
        return "weights_cache"
    if len(parts) == 1 or parts[1][0].isupper():
        return "api"
    return name if (name := ".".join(parts[1:3])) in MAY_IMPORT else parts[1]


def imported(node, here):
    """The dotted names that an import statement in the module `here` (a tuple of names) brings in, split up."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = here[: -node.level] if node.level else ()
        module = tuple(node.module.split(".")) if node.module else ()
        return [(*base, *module, alias.name) for alias in node.names]
    return []


def imports():
    """Every import of our own modules: the file, its module and the imported name, both as tuples."""
    for file in sorted([*ROOT.glob("pixtral_cli/**/*.py"), *ROOT.glob("weights_cache/**/*.py")]):
        here = file.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text())):
            for parts in imported(node, here):
                if parts[0] in ("pixtral_cli", "weights_cache") and parts[-1] != "__version__":
                    yield file.relative_to(ROOT), here, parts


def arrows():
    for file, here, parts in imports():
        yield file, room(here), room(parts)


def file_of(parts):
    """The file that holds the name: a module, a package's __init__, or the module in which a class is."""
    for module in (parts, parts[:-1]):
        for path in (Path(*module).with_suffix(".py"), Path(*module, "__init__.py")):
            if module and (ROOT / path).is_file():
                return path
    raise AssertionError(f"no file holds {'.'.join(parts)}")


def test_every_import_follows_an_arrow_of_the_design():
    seen = list(arrows())
    assert {"cli", "commands", "api", "engine", "model", "weights_cache"} <= {source for _, source, _ in seen}
    wrong = [
        f"{file}: {source} -> {target}"
        for file, source, target in seen
        if source != target and target not in MAY_IMPORT[source] | (SHARED if source != "weights_cache" else set())
    ]
    assert wrong == []


def test_every_arrow_that_is_drawn_is_taken():
    taken = {(source, target) for _, source, target in arrows()}
    assert {(source, target) for source, targets in MAY_IMPORT.items() for target in targets} - taken == set()


def test_prompt_and_engine_do_not_know_each_other():
    assert not {("prompt", "engine"), ("engine", "prompt")} & {(source, target) for _, source, target in arrows()}


def test_rooms_and_files_import_each_other_in_no_circle():
    """Imports inside functions count as well. A circle raises CycleError, whose text names its members."""
    files = {}
    for file, _, parts in imports():
        files.setdefault(file, set()).add(file_of(parts))
    TopologicalSorter(MAY_IMPORT).prepare()
    TopologicalSorter({file: targets - {file} for file, targets in files.items()}).prepare()
