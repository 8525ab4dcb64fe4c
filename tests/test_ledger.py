"The ledger names cells that exist, every cell that makes a paper's item is in it, and its words follow its numbers."
import json
import re
from pathlib import Path

import polars as pl
import pytest

from ehr_r1.evaluation.ledger import NOT_PUBLISHED, PLUMBING, ledger, our_effects, paper_items, status_of, their_value
from ehr_r1.evaluation.published import published

REPORTS = Path('nbs/11_reports')
ITEMS = paper_items().to_dicts()
STATUSES = {'shows', 'does not show', 'runs on open data', 'not run', NOT_PUBLISHED, PLUMBING}


def code_cells(report):
    "The code cells of a report, as text."
    notebook = json.loads((REPORTS/f'{report}.ipynb').read_text())
    return [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']


def marks():
    "(paper, what it says that it makes) of every cell that is marked."
    found = []
    for path in sorted(REPORTS.glob('[0-9]*.ipynb')):
        for text in code_cells(path.stem):
            if mark := re.match(r'# paper: ([\w-]+), (.+)', text):
                found.append((path.stem, *mark.groups(), text))
    return found


@pytest.mark.parametrize('item', ITEMS, ids=lambda item: item['quantity'])
def test_an_item_names_a_cell_that_makes_it(item):
    table = re.compile(rf"'{item['table']}'")
    makers = [text for report, paper, said, text in marks()
              if report == item['report'] and paper == item['paper'] and item['item'].split(':')[0] in said]
    assert any(table.search(text) for text in makers), f"{item['report']}: no marked cell makes {item['table']}"


def test_every_marked_cell_is_in_the_ledger():
    listed = {(item['report'], item['paper'], item['table']) for item in ITEMS}
    for report, paper, said, text in marks():
        made = [table for place, of, table in listed if (place, of) == (report, paper) and f"'{table}'" in text]
        assert made, f'{report}: the cell that makes {paper}, {said} is not in paper_items.csv'


@pytest.mark.parametrize('item', [item for item in ITEMS if item['theirs']], ids=lambda item: item['quantity'])
def test_what_a_paper_says_is_found(item):
    assert their_value(item['paper'], item['theirs']) != NOT_PUBLISHED


@pytest.mark.parametrize('run', ['demo', 'study'])
def test_of_kept_reports_every_line_has_a_status(run):
    lines = ledger(Path('reports')/run, reads=False)
    assert set(lines['status']) <= STATUSES
    assert len(lines) == len(ITEMS)
    assert (lines['status'] == 'not run').sum() < len(lines)/2
    assert not lines.filter(pl.col('status') == 'not run', pl.col('ours') != '').height


def test_an_effect_is_the_difference_that_its_table_holds():
    found = {effect['quantity']: effect for effect in our_effects(Path('reports/study'))}
    rows = pl.read_csv('reports/study/reasoning_effects.csv').filter(effect='Both against neither')
    effect = found['reasoning in the data and at inference, F1']
    assert effect['value'] == pytest.approx(rows['difference'][0])
    values = published().filter(item='ablation')['value']
    assert effect['published'] == pytest.approx(values[1] - values[0])


def test_a_difference_the_other_way_round_turns_its_interval(tmp_path):
    rows = dict(first=['general'], second=['reasoned'], metric=['f1'], difference=[-.4], low=[-.6], high=[-.3])
    pl.DataFrame(rows).write_csv(tmp_path/'models_against.csv')
    effect, = our_effects(tmp_path)
    assert (effect['value'], effect['low'], effect['high']) == (.4, .3, .6)


@pytest.mark.parametrize('text', ['', 'n/a', 'not known', '0.5 (', '()', 'nan'])
def test_what_is_no_number_is_not_run(tmp_path, text):
    row = dict(system=['reasoned'], F1=[text], AUROC=['0.7 (0.6 to 0.8)'])
    pl.DataFrame(row).write_csv(tmp_path/'stages_overall.csv')
    lines = ledger(tmp_path).filter(report='06_stages', item='figure 1c')
    assert lines['status'].to_list() == ['not run', 'runs on open data']


def test_an_effect_without_an_interval_does_not_show():
    assert status_of((.3, None, None), NOT_PUBLISHED, 'effect') == 'does not show'


@pytest.mark.parametrize('text', ['', '\n', 'system,F1\n', 'other\n1\n'])
def test_a_table_that_is_empty_or_another_is_not_run(tmp_path, text):
    (tmp_path/'stages_overall.csv').write_text(text)
    assert set(ledger(tmp_path)['status']) == {'not run'}
