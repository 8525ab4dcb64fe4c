"""Build the site (make docs): notebooks, API index and executed reports, with the outputs they hold, into _docs/.

nbdev runs its processors over nbs/ (signatures of exported definitions, links between names); cells.py turns what comes
out into pages that MyST-NB reads, and Sphinx builds them with warnings as errors.
"""
import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from cells import directives, label_of, page, quiet
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
RUNS = ('study', 'demo')  # whose reports are kept


def name_of(path):
    "Name of a notebook's page, as nbdev links to it: without the number in front."
    return (path.parent/re.sub(r'^\d+_', '', path.stem)).as_posix()


def caption(folder):
    "What the sidebar calls a folder of notebooks: 02_data is Data."
    words = re.sub(r'^\d+_', '', folder).replace('_', ' ')
    return words[:1].upper() + words[1:]


def module_of(path):
    "The module that a notebook exports, dotted without the package; '' where it exports none."
    cells = nbformat.read(path, as_version=4).cells
    named = [directives(c.source)[0].get('default_exp') for c in cells if c.cell_type == 'code']
    return next(filter(None, named), '')


def linked(text, site, pages, labels, modules):
    "A page's text in which nbdev's links between names are references within the site."
    def link(match):
        name, target = match[1], match[2].removesuffix('.html')
        label = label_of(modules.get(target, ''), name)
        if label in labels:
            return f'[`{name}`](#{label})'
        return f'[`{name}`](/{target}.ipynb)' if target in pages else f'`{name}`'
    return re.sub(rf'\[`([^`\]]+)`\]\({re.escape(site)}/([^)#]+)(?:#[^)]*)?\)', link, text)


def with_figures(text, folder, source):
    "A page's text whose figures are copied to the site; those that do not exist yet become a line of text."
    def figure(match):
        file = folder/match[2]
        if not file.exists():
            return f'*{match[1]} (made by `make reproduce`)*'
        place = file.resolve().relative_to(ROOT)
        (source/place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, source/place)
        return f'![{match[1]}](/{place.as_posix()})'
    return re.sub(r'!\[([^\]]*)\]\((?!https?:|attachment:|data:)([^)]+)\)', figure, text)


def between_pages(text, folder, pages):
    "A page's text whose links to notebooks lead to their pages."
    def link(match):
        place = (folder/match[1]).resolve().relative_to(ROOT).with_suffix('')
        name = place.as_posix() if place.parts[0] == 'reports' else name_of(place.relative_to('nbs'))
        if name not in pages:
            raise ValueError(f'{folder.relative_to(ROOT)}: no page for the link to {match[1]}')
        return f'](/{name}.ipynb)'
    return re.sub(r'\]\((?!https?:|[#/])([^)#\s]+\.ipynb)\)', link, text)


def documented(tree, source):
    "What a module's names are: the first line of a docstring, or the comment on the line of data."
    docs, lines = {}, source.splitlines()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            docs[node.name] = (ast.get_docstring(node) or '').split('\n')[0]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            docs[node.targets[0].id] = lines[node.lineno - 1].partition('  # ')[2]
    return docs


def public_names(tree):
    "A module's __all__."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value)
    return []


def api_of(module, where, pages, labels):
    "The lines of the API index for one module."
    source = (ROOT/'ehr_r1'/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8')
    tree = ast.parse(source)
    docs = documented(tree, source)
    title = f'[ehr_r1.{module}](/{where}.ipynb)' if where in pages else f'ehr_r1.{module}'
    lines = ['', f'## {title}', '', ast.get_docstring(tree) or '', '', '| name | what |', '| --- | --- |']
    for name in public_names(tree):
        label = label_of(module, name)
        shown = f'[`{name}`](#{label})' if label in labels else f'`{name}`'
        what = (docs.get(name) or 'data').replace('|', r'\|')
        lines.append(f'| {shown} | {what} |')
    return lines


def api(pages, labels, modules):
    "One line for every exported name, by module in reading order."
    lines = ['# API', '', 'Every exported name, with the notebook that explains it.']
    for where, module in modules.items():
        lines += api_of(module, where, pages, labels)
    return '\n'.join(lines) + '\n'


def processed(folder):
    "Run nbdev's processors over a copy of nbs/ in this folder; where the results are."
    from nbdev.serve import proc_nbs
    shutil.copy(ROOT/'settings.ini', folder)
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('*_reports', '[_.]*'))
    for path in folder.rglob('*.ipynb'):
        quiet(path)
    with contextlib.chdir(folder):
        return folder/proc_nbs('nbs', n_workers=2, force=True)


def notebook_modules():
    "Page name -> module, in reading order."
    books = sorted((ROOT/'nbs').rglob('*.ipynb'))
    found = {name_of(p.relative_to(ROOT/'nbs')): module_of(p) for p in books if '.ipynb_checkpoints' not in p.parts}
    return {name: module for name, module in found.items() if module}


def entitle(nb, run):
    "Tell in a report's title of which run it is."
    first = nb.cells[0]
    first.source = re.sub(r'^# (.+)$', rf'# \1 ({run})', first.source, count=1, flags=re.M)


def collect(folder, modules):
    "All pages by name, their names by part of the site in reading order, and the labels they define."
    pages, parts, labels = {}, {}, set()
    for path in sorted(folder.rglob('*.ipynb')):
        name = name_of(path.relative_to(folder))
        pages[name], found = page(path, modules.get(name, ''))
        labels |= found
        if name != 'index':
            parts.setdefault(caption(name.split('/')[0]), []).append(name)
    for run in RUNS:
        for path in sorted((ROOT/'reports'/run).glob('*.ipynb')):
            name = f'reports/{run}/{path.stem}'
            pages[name], _ = page(path, report=True)
            entitle(pages[name], run)
            parts.setdefault(f'Reports: {run}', []).append(name)
    return pages, parts, labels


def contents(parts):
    "A table of contents for the sidebar."
    trees = []
    for part, names in [*parts.items(), ('Reference', ['api'])]:
        entries = '\n'.join(f'/{name}' for name in names)
        trees.append(f'```{{toctree}}\n:caption: {part}\n:hidden:\n\n{entries}\n```')
    return '\n\n'.join(trees)


def site_address():
    "Where nbdev's links between names lead."
    text = (ROOT/'ehr_r1'/'_modidx.py').read_text(encoding='utf-8')
    settings = ast.literal_eval(text.split('d = ', 1)[1])['settings']
    return settings['doc_host'] + settings['doc_baseurl']


def write_sources(work, source):
    "Write everything that Sphinx reads; how many pages there are."
    modules, site = notebook_modules(), site_address()
    pages, parts, labels = collect(processed(work), modules)
    pages['index'].cells.append(new_markdown_cell(contents(parts)))
    shutil.copytree(ROOT/'docs', source, ignore=shutil.ignore_patterns('*.py', '__pycache__'))
    shutil.copy(ROOT/'docs'/'conf.py', source)
    for name, nb in pages.items():
        folder = ((ROOT if name.startswith('reports/') else ROOT/'nbs')/name).parent
        for cell in nb.cells:
            if cell.cell_type == 'markdown':
                text = between_pages(linked(cell.source, site, pages, labels, modules), folder, pages)
                cell.source = with_figures(text, folder, source)
        (source/f'{name}.ipynb').parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, source/f'{name}.ipynb')
    (source/'api.md').write_text(api(pages, labels, modules), encoding='utf-8')
    return len(pages) + 1


def build(out):
    "Prepare the pages in a temporary folder and run Sphinx on it."
    with tempfile.TemporaryDirectory() as folder:
        work, source = Path(folder)/'work', Path(folder)/'site'
        work.mkdir()
        count = write_sources(work, source)
        sphinx = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html']
        made = Path(folder)/'html'  # myst-nb leaves a folder of its own beside the site
        code = subprocess.run([*sphinx, '-d', f'{folder}/doctrees', str(source), str(made)]).returncode
        if code:
            sys.exit(code)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    for case in (ROOT/'reports').glob('*/*.html'):  # whole pages of their own, which reports link to
        if (place := out/case.relative_to(ROOT).parent).is_dir():
            shutil.copy(case, place)
    print(f'{count} pages, from {os.path.relpath(out)}/index.html on')


if __name__ == '__main__':
    build(Path(*sys.argv[1:] or [ROOT/'_docs']))
