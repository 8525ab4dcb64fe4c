"""Write README.md from nbs/index.ipynb, as it stands with its outputs."""
import re

import nbformat
from cells import tag
from nbconvert import MarkdownExporter
from pages import ROOT
from traitlets.config import Config

HEAD = '<!-- made from nbs/index.ipynb by make readme -->\n\n'


def readme(root=ROOT):
    "The text of README.md."
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if tag(c)]
    config = Config({'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': {'remove-input'}}})
    text, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    text = re.sub(r'\]\((?=\d\d_)', '](nbs/', text)
    text = text.replace('](../', '](')  # nbs/ is one folder down, README.md is not
    return HEAD + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
