"Rules of the hospital's charting: each draws by its own name, so that their order, or one more, changes no other."
import numpy as np
import polars as pl
import pytest

from ehr_r1.hospital import infusions, intensive, order_entry, pharmacy
from ehr_r1.hospital.block import new_block
from ehr_r1.hospital.emergency import chart_emergency
from ehr_r1.hospital.intensive import chart_intensive
from ehr_r1.hospital.laboratory import chart_laboratory
from ehr_r1.hospital.notes import chart_notes
from ehr_r1.hospital.order_entry import CARE_RULES, CareRule
from ehr_r1.hospital.orders import chart_orders
from ehr_r1.hospital.visits import ADMISSION_DRAWS, chart_visits, ends

STEPS = (chart_visits, chart_emergency, chart_laboratory, chart_orders, chart_intensive, chart_notes)


def charted():
    "A block after every step, and its tables."
    b, tables = new_block(5, 0), {}
    for step in STEPS:
        tables |= step(b)
    return b, {name: pl.DataFrame(columns) for name, columns in tables.items()}


@pytest.fixture(scope='module')
def before():
    return charted()


def test_no_two_quantities_draw_with_one_name(before):
    b, _ = before
    assert [name for name, times in b.random.drawn.items() if times > 1] == []


@pytest.mark.parametrize('rules, fields', [
    (CARE_RULES, ('order', 'for_whom')),
    (intensive.PROCEDURES, ('item', 'for_whom')),
    (intensive.OUTPUTS, ('item',)),
    ([*infusions.DRIPS, *infusions.PUSHES], ('item',)),
])
def test_rules_of_a_table_have_names_of_their_own(rules, fields):
    names = [tuple(getattr(rule, field) for field in fields) for rule in rules]
    assert len(set(names)) == len(names)


def reversed_rules(monkeypatch, module, name):
    rules = getattr(module, name)
    turned = dict(reversed(rules.items())) if isinstance(rules, dict) else rules[::-1]
    monkeypatch.setattr(module, name, turned)


@pytest.mark.parametrize('module, name', [
    (order_entry, 'CARE_RULES'),
    (pharmacy, 'SCHEDULES'),
    (infusions, 'DRIPS'),
    (infusions, 'PUSHES'),
    (intensive, 'OUTPUTS'),
    (intensive, 'PROCEDURES'),
    (intensive, 'LINE_DATES'),
])
def test_the_order_of_rules_changes_no_table(before, monkeypatch, module, name):
    reversed_rules(monkeypatch, module, name)
    _, after = charted()
    differ = [table for table, frame in before[1].items() if not frame.equals(after[table])]
    assert differ == []


def orders_but(poe, subtype):
    kept = poe.filter(pl.col('order_subtype').ne_missing(subtype))
    return kept.select('subject_id', 'ordertime', 'order_type', 'order_subtype', 'transaction_type')


def test_one_more_rule_changes_no_other_order(before, monkeypatch):
    more = [CareRule('wound', 'everyone', .5, 'ward', minutes=90), *CARE_RULES]
    monkeypatch.setattr(order_entry, 'CARE_RULES', more)
    _, after = charted()
    before_poe, after_poe = before[1]['poe'], after['poe']
    assert len(after_poe) > len(before_poe)
    assert orders_but(before_poe, 'Wound Care').equals(orders_but(after_poe, 'Wound Care'))


def test_one_drip_less_changes_no_other_input(before, monkeypatch):
    names = [drip.item for drip in infusions.DRIPS]
    without = [drip for drip in infusions.DRIPS if drip.item != 'propofol']
    monkeypatch.setattr(infusions, 'DRIPS', without)
    assert 'propofol' in names
    _, after = charted()
    columns = ['stay_id', 'itemid', 'starttime', 'storetime', 'amount', 'rate']
    inputs = before[1]['inputevents'].select(columns)
    left = after['inputevents'].select(columns)
    kept = inputs.filter(pl.col('itemid').is_in(left['itemid'].unique().implode()))
    assert len(left) < len(inputs)
    assert kept.equals(left)


def test_some_deaths_have_a_flag_and_no_time():
    block = new_block(42, 0)
    draws = block.random.of('test').columns(ADMISSION_DRAWS, len(block.adm))
    never, always = np.ones(len(block.adm)), np.zeros(len(block.adm))
    untimed = ends(block, draws | dict(midnight=never, untimed=always))
    assert untimed['deathtime'].null_count() == len(block.adm)
    timed = ends(block, draws | dict(midnight=never, untimed=never))
    assert len(block.adm) - timed['deathtime'].null_count() == block.v['died'].sum()
