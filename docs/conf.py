"""Builds the documentation's site: `make docs`. Nothing here needs a network."""

import ast
import dataclasses
import importlib.metadata
import inspect
import os
import re
import textwrap

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import latex2mathml.converter
from docutils import nodes
from sphinx.util.nodes import make_refnode

project = "metatuner_jax"
copyright = "the authors of metatuner_jax, Apache-2.0"
release = version = importlib.metadata.version("metatuner_jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
smartquotes = False
html_title = f"metatuner_jax {release}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # what stands in `backticks` in a docstring
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "replace"}  # flax adds it to every record
napoleon_numpy_docstring = False
# What is not ours is named in signatures and not linked to: to link it would take the inventories of other sites.
nitpick_ignore_regex = [(r"py:.*", r"(?!metatuner_jax\.).*")]

linkcheck_ignore = [r"http://127\.0\.0\.1.*"]


def setup(app):
    app.add_html_math_renderer("mathml", (as_mathml, None), (as_mathml, None))
    app.connect("include-read", at_home)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-process-docstring", with_fields)
    app.connect("doctree-resolved", link_names)


def as_mathml(writer, node):
    """Writes a formula as MathML, which browsers draw by themselves, without a script from elsewhere."""
    if isinstance(node, nodes.math_block):  # a wide one is moved by itself, and not the page
        formula = latex2mathml.converter.convert(node.astext(), display="block")
        writer.body.append(f'<div style="margin: 1em 0; overflow-x: auto">{formula}</div>')
    else:
        writer.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def at_home(app, path, page, content):
    """Has a file that is taken in from the top of the repository link to pages of the site."""
    for name in ("CONTRIBUTING", "CHANGELOG", "RESULTS"):
        content[0] = content[0].replace(f"]({name}.md", f"]({name.lower()}.md")
    content[0] = content[0].replace("](docs/", "](").replace("](README.md", "](quickstart.md")


def as_written(app, what, name, obj, options, signature, returns):
    """Returns the signature of a function as the code has it: jaxtyping's own names of its types are hard to read. A record has its fields below."""
    if what == "class" and dataclasses.is_dataclass(obj):
        return "", None
    if what not in ("function", "method"):
        return None
    function = inspect.unwrap(obj)
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError):  # made by a library
        return None
    arguments = source.args
    for first in (arguments.posonlyargs, arguments.args):
        if what == "method" and first and first[0].arg in ("self", "cls"):
            del first[0]
    return f"({ast.unparse(arguments)})", ast.unparse(source.returns) if source.returns else None


def with_fields(app, what, name, obj, options, lines):
    """Adds to a record's docstring its fields: of settings the default and the help, of others the comment beside them."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(obj), re.MULTILINE))
    fields = dataclasses.fields(obj)
    linen = {"parent", "name"} if any(field.name == "parent" for field in fields) else set()  # what it adds to a module
    lines.append("")
    for field in fields:
        if field.name in linen:
            continue
        text = field.metadata.get("help") or comments.get(field.name, "")
        if "help" in field.metadata:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            shown = "none" if default is None else ",".join(default) if isinstance(default, tuple) else str(default)
            text = f"{text} (default: ``{shown or 'empty'}``)"
        lines.append(f"- **{field.name}**" + (f": {text.replace('*', chr(92) + '*')}" if text else ""))
    lines.append("")


def link_names(app, doctree, page):
    """Has a name of the library that stands in a text as code, such as `losses.joint_loss`, lead to its reference."""
    known = app.env.get_domain("py").objects
    for node in list(doctree.findall(nodes.literal)):
        found = known.get(f"metatuner_jax.{node.astext().removesuffix('()')}")
        if found and not isinstance(node.parent, nodes.reference):
            node.replace_self(make_refnode(app.builder, page, found.docname, found.node_id, node.deepcopy()))
