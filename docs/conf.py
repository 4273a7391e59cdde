"""Settings of Sphinx; build with `sphinx-build -W --keep-going -b html docs docs/_build`."""

import dataclasses
import re
import sys
from importlib import metadata
from pathlib import Path

# The package that is described is the one beside this folder.
sys.path.insert(0, str(Path(__file__).parent.parent))

project = "fedrevive_jax"
release = metadata.version("fedrevive-jax")
version = release
html_title = project

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
autosummary_generate = True
html_theme = "furo"
html_copy_source = False
smartquotes = False

# Anchors of headings as GitHub makes them, so that a link works in both places.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Docstrings mark code with single backticks.
default_role = "code"
napoleon_numpy_docstring = False
# The fields of a record are told once, in its "Attributes".
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_attr_annotations = False
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": False}
# Names of the signature as they are written, not the value that they stand for.
autodoc_preserve_defaults = True
# Of the extra `live`, which pages about the rest do without.
autodoc_mock_imports = ["cryptography", "flwr", "httpx", "uvicorn"]
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True


def display_formulas(app, what, name, obj, options, lines):
    """An indented block of a module's docstring is shown as it is: a formula, a list of files."""
    if what != "module":
        return
    shown = []
    for number, line in enumerate(lines):
        begins = re.match(r" {4}\S", line) and (number == 0 or not lines[number - 1].strip())
        if begins:
            shown += ["::", ""]
        shown.append(line)
    lines[:] = shown


def plain_words(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backticks; what else Sphinx would read is quoted."""
    for number, line in enumerate(lines):
        pieces = re.split(
            r"(`[^`]*`|(?<![\w*])\*\w[^*]*\w\*(?![\w*])|^ *\*\*?\w+(?=[,:])|^ *\* )", line
        )
        for place in range(0, len(pieces), 2):
            pieces[place] = re.sub(r"([*|])", r"\\\1", pieces[place])
            if place and re.match(r"\w", pieces[place]):  # `Upload`s
                pieces[place] = r"\ " + pieces[place]
        lines[number] = "".join(pieces)


def one_field_a_line(app, what, name, obj, options, lines):
    """`first, second: words` among attributes is a field each, with the same words."""
    if "Attributes:" not in lines:
        return
    start = lines.index("Attributes:") + 1
    inside = [n for n in range(start, len(lines)) if re.match(r" {2,4}\S|$", lines[n])]
    for number in reversed(inside):
        found = re.match(r"(  +)(\w+(?:, \w+)+)(: .*)", lines[number])
        if found:
            end = number + 1
            while end < len(lines) and lines[end].startswith(found[1] + " "):
                end += 1
            words = lines[number + 1 : end]
            lines[number:end] = [
                line
                for field in found[2].split(", ")
                for line in (found[1] + field + found[3], *words)
            ]


def shorten_signature(app, what, name, obj, options, signature, returns):
    """Types without their modules, and no addresses of functions that are defaults."""
    if signature:
        signature = re.sub(r"<function [^<>]*(?:<\w+>)?[^<>]*>", "...", signature)
        # There are two classes of the name Server: a page has to know which.
        signature = re.sub(r"~(?:\w+\.)+(?!\w*\.)(?!Server\b)", "", signature)
    return signature, returns


def skip_fields(app, what, name, obj, skip, options):
    """Fields of a `NamedTuple` have no words of their own."""
    words = getattr(obj, "__doc__", None) or ""
    return True if words.startswith("Alias for field number") else None


def write_settings(app):
    """A page with every setting of a run, from the fields themselves."""
    from fedrevive_jax.config import LIMITS, Clients, Device, Dfkd, FedGen, Record, Server, World

    text = [
        "# Settings",
        "Every field of `Config`, which is also a flag: `num_clients` is `--num_clients`. The "
        "default stands for what the preset of (data set, method) leaves open; `presets.py` has "
        "the presets.",
    ]
    for part in (World, Clients, Server, FedGen, Dfkd, Record, Device):
        text += [
            f"## {part.__name__}",
            (part.__doc__ or "").strip(),
            "| field | default | what |\n|---|---|---|",
        ]
        for field in dataclasses.fields(part):
            limits = field.metadata
            words = [limits["help"]]
            if "choices" in limits:
                words.append("one of " + ", ".join(f"`{choice}`" for choice in limits["choices"]))
            words += [f"{LIMITS[name]} {limits[name]:g}" for name in LIMITS if name in limits]
            default = "empty" if field.default == "" else field.default
            text[-1] += f"\n| `{field.name}` | {default} | {'; '.join(words)} |"
    folder = Path(app.srcdir) / "api" / "generated"
    folder.mkdir(exist_ok=True)
    page, new = folder / "settings.md", "\n\n".join(text) + "\n"
    if not page.exists() or page.read_text() != new:
        page.write_text(new)


def lead_out(app, docname, source):
    """Pages of Markdown outside of docs/ are no pages of Sphinx: they are offered as files."""
    page = Path(app.env.doc2path(docname))

    def link(found):
        outside = not (page.parent / found[1]).resolve().is_relative_to(Path(app.srcdir).resolve())
        return f"](path:{found[1]})" if outside else found[0]

    source[0] = re.sub(r"\]\((\.\./[^)#]*\.md)(?:#[^)]*)?\)", link, source[0])


def setup(app):
    app.connect("source-read", lead_out)
    app.connect("builder-inited", write_settings)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", plain_words, priority=300)
    app.connect("autodoc-process-docstring", one_field_a_line, priority=350)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", display_formulas, priority=400)
    app.connect("autodoc-skip-member", skip_fields)
