"""Who may import whom, as DESIGN.md draws it: the arrows run down, never back up and never around."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = {
    "errors",
    "encodings",
    "devices",
    "known_models",
    "option_ranges",
}  # names and failures, which know nothing but each other
MAY_IMPORT = {
    "__main__": {"cli", "process_environment"},
    "cli": {"commands", "console", "flags", "help", "weights_cache"},
    "commands": {"api", "console", "flags", "options", "prompt", "server", "shell", "source", "weights_cache"},
    "server": {"api", "engine", "generation", "prompt"},
    "api": {"constraints", "generation", "source", "engine", "model", "prompt"},
    "generation": {"constraints", "generation_options", "engine", "prompt"},
    "generation_options": {"constraints", "engine"},
    "constraints": {"engine", "prompt"},
    "source": {"model", "prompt", "tiny", "weights_cache"},
    "tiny": {"api", "model"},
    "engine": {"model"},
    "model": {"weights_cache"},
    "__init__": set(),
    "prompt": set(),
    "console": {"progress"},
    "options": {"flags", "shell"},
    "flags": {"shell"},
    "shell": {"weights_cache"},
    "help": set(),
    "process_environment": set(),
    "progress": set(),
    "weights_cache": set(),
} | dict.fromkeys(SHARED, set())


def room(parts):
    """The room of pixtral_cli.engine.engine is `engine`; what pixtral_cli itself offers lives in `api`."""
    if parts[0] == "weights_cache":
        return "weights_cache"
    return "api" if len(parts) == 1 or parts[1][0].isupper() else parts[1]


def imported(node, here):
    """The dotted names that an import statement in the module `here` (a tuple of names) brings in, split up."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = here[: -node.level] if node.level else ()
        module = tuple(node.module.split(".")) if node.module else ()
        return [(*base, *module, alias.name) for alias in node.names]
    return []


def arrows():
    for file in sorted([*ROOT.glob("pixtral_cli/**/*.py"), *ROOT.glob("weights_cache/**/*.py")]):
        here = file.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(file.read_text())):
            for parts in imported(node, here):
                if parts[0] in ("pixtral_cli", "weights_cache") and parts[-1] != "__version__":
                    yield file.relative_to(ROOT), room(here), room(parts)


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
