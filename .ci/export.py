"""Export the library from the notebooks (make notebooks): nbdev_export, with lists of names no longer than other lines.

nbdev breaks `__all__` at 120 characters without counting what stands in front of it; ruff counts all of a line.
"""
import re
from pathlib import Path
from textwrap import fill

from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parent.parent
NAMES = re.compile(r'^__all__ = \[.*?\]$', re.M | re.S)


def folded(match):
    "A list of names, broken at 120 characters."
    text = ' '.join(match[0].split())
    return fill(text, 120, subsequent_indent=' '*11, break_long_words=False, break_on_hyphens=False)


def main():
    "Export every notebook and fold the lists of names."
    nbdev_export()
    for module in (ROOT/'ehr_r1').rglob('*.py'):
        text = module.read_text(encoding='utf-8')
        shorter = NAMES.sub(folded, text, count=1)
        if shorter != text:
            module.write_text(shorter, encoding='utf-8')


if __name__ == '__main__':
    main()
