"""Scores: definitions by hand, agreement with scikit-learn, and hostile answers."""
import json
import time

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from ehr_r1.evaluation.benchmark import readings_table
from ehr_r1.intervals import evaluate, score_table
from ehr_r1.scoring import (
    auprc,
    auroc,
    brier,
    calibration,
    match_risk,
    parse_answer,
    score_decision,
    score_risk,
    set_f1,
)

# ---- answers

@pytest.mark.parametrize('text, opened, lines, status', [
    ('Sodium\nPotassium', False, ['Sodium', 'Potassium'], 'answered'),
    ('<think>Glucose</think>\r\n  Sodium \r\n\n', False, ['Sodium'], 'answered'),
    ('<think>a</think>b<think>c</think>d', False, ['d'], 'answered'),
    ('chain without its opening tag</think>Sodium', True, ['Sodium'], 'answered'),
    ('<think>Sodium', False, [], 'unclosed'),
    ('<think>a</think>Sodium<think>more', False, [], 'unclosed'),
    ('Sodium', True, [], 'unclosed'),
    ('<think>Sodium</think> \n\t', False, [], 'empty'),
    ('', False, [], 'empty'),
    (None, False, [], 'empty'),
])
def test_answer_is_what_follows_the_last_closing_tag(text, opened, lines, status):
    answer = parse_answer(text, opened)
    assert answer.lines == lines
    assert answer.status == status


PIECES = ['<think>', '</think>', '\n', '\r\n', '\x00', '\ud800', '\x1f', '\u2028', ' ']


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=20))
def test_any_text_gives_lines_that_can_be_stored(parts):
    answer = parse_answer(''.join(parts))
    for line in answer.lines:
        assert line
        assert line == line.strip()
        assert '\n' not in line
    assert (answer.status == 'answered') == bool(answer.lines)
    stored = pl.Series([answer.lines], dtype=pl.List(pl.String))
    assert stored[0].to_list() == answer.lines


@pytest.mark.parametrize('unit', [
    '<think>', '</think>', '<think></think>', '\n', 'a\n', '<', '\x00', '\ud800 \n', '<think>\n</think>\nSodium\n',
])
def test_ten_megabytes_take_a_moment(unit):
    text = unit*(10_000_000//len(unit))
    start = time.process_time()
    answer = parse_answer(text)
    set_f1(['Sodium'], answer.lines)
    assert time.process_time() - start < 10


# ---- the lenient reading

NAMES = [
    ['0.9% Sodium Chloride', 'Aspirin', '5% Dextrose'],
    ['5% Dextrose', '24 hr urine protein', '1,25-Dihydroxyvitamin D'],
    ['*NF* Heparin', 'Potassium, Whole Blood', 'Morphine inj.'],
    ['Sodium'],
    ['2-D echocardiogram'],
    ['1.25% Levobupivacaine', '2.5% Bupivacaine', '3% Saline'],
]


def counted(names, form):
    return [form.format(number, name) for number, name in enumerate(names, 1)]


WAYS = dict(
    bare=lambda names: names,
    numbered=lambda names: counted(names, '{}. {}'),
    brackets=lambda names: counted(names, '{}) {}'),
    round=lambda names: counted(names, '({}) {}'),
    ones=lambda names: [f'1. {name}' for name in names],
    dashes=lambda names: [f'- {name}' for name in names],
    stars=lambda names: [f'* {name}' for name in names],
    bullets=lambda names: [f'• {name}' for name in names],
    long_dashes=lambda names: [f'– {name}' for name in names],
    boxes=lambda names: [f'- [ ] {name}' for name in names],
    bold=lambda names: [f'**{name}**' for name in names],
    bold_numbered=lambda names: counted(names, '{}. **{}**'),
    all_bold=lambda names: counted(names, '**{}. {}**'),
    bold_dashes=lambda names: [f'- **{name}**' for name in names],
    code=lambda names: [f'`{name}`' for name in names],
    quoted=lambda names: [f'"{name}",' for name in names],
    periods=lambda names: [f'{name}.' for name in names],
    fenced=lambda names: ['```', *names, '```'],
    fenced_list=lambda names: ['```markdown', *counted(names, '{}. {}'), '```', 'I hope this helps'],
    fenced_json=lambda names: ['```json', json.dumps(names, indent=2), '```'],
    json=lambda names: [json.dumps(names)],
    json_named=lambda names: [json.dumps(dict(answer=names))],
    python=lambda names: [repr(names)],
    label=lambda names: ['Answer:', *names],
    label_before=lambda names: [f'Answer: {names[0]}', *names[1:]],
    bold_label=lambda names: [f'**Final answer:** {names[0]}', *names[1:]],
    heading=lambda names: ['## Final Results', '', *(f'- {name}' for name in names)],
    announced=lambda names: ['Here are the ordered drugs:', '', *counted(names, '{}. {}')],
    windows=lambda names: [f'{line}\r' for line in counted(names, '{}. {}')],
)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('names', NAMES, ids=lambda names: names[0])
def test_a_list_is_read_as_its_names(names, way):
    answer = parse_answer('<think>t</think>\n\n' + '\n'.join(WAYS[way](names)))
    assert answer.status == 'answered'
    assert set_f1(names, answer.lines) == 1
    assert len(answer.lines) == len(names)


@pytest.mark.parametrize('way', set(WAYS) - {'bare', 'windows'})
def test_the_strict_reading_takes_a_list_by_the_letter(way):
    names = NAMES[0]
    answer = parse_answer('\n'.join(WAYS[way](names)))
    assert set_f1(names, answer.written, strict=True) < 1
    assert set_f1(names, parse_answer('\n'.join(names)).written, strict=True) == 1


@pytest.mark.parametrize('text, lines', [
    ('2. Diagnosis\n5. Procedure', ['2. Diagnosis', '5. Procedure']),   # these count nothing
    ('1.5 mL syringe\n2.5 mL syringe', ['1.5 mL syringe', '2.5 mL syringe']),
    ('4. Stage', ['4. Stage']),
    ('-', []),
    ('**', []),
    ('[1, 2]', ['[1, 2]']),
    ('{"prediction": "Eligible", "idx": 2}', ['{"prediction": "Eligible", "idx": 2}']),
    ('[]', []),
    ('["a\\nb"]', ['a', 'b']),
    ('["\\ud800a"]', ['a']),
    ('Yes.', ['Yes']),
    ('**yes**', ['yes']),
    ('The answer is **no**.', ['no']),
    ('**Sodium** and **Potassium**', ['**Sodium** and **Potassium**']),
    ('["a"', ['["a"']),
])
def test_what_is_left_of_marks(text, lines):
    answer = parse_answer(text)
    assert answer.lines == lines
    assert (answer.status == 'answered') == bool(lines)


ENDLESS = ['*', '**', '- ', '1. ', '•', '#', '# \n', '1. a\n', '[', '["', "['", "',", '{"a":', '`', '```\n', 'answer:',
           'answer: \n', '_', '(1', '"']


@pytest.mark.parametrize('unit', ENDLESS)
@pytest.mark.parametrize('size', [90_000, 2_000_000])
def test_marks_without_end_take_a_moment(unit, size):
    text = unit*(size//len(unit))
    start = time.process_time()
    parse_answer(text)
    assert time.process_time() - start < 2


def test_models_are_scored_in_both_readings():
    samples = pl.DataFrame(dict(sample_id=['a', 'b'], subject_id=[1, 2], task='labevents', family='decision',
                                label=[['Sodium'], ['Potassium']]))
    answers = [parse_answer('1. Sodium'), parse_answer('Potassium')]
    said = samples.select('sample_id', 'task', answer=pl.Series([answer.lines for answer in answers]),
                          written=pl.Series([answer.written for answer in answers]))
    table = score_table(evaluate(samples, dict(base=said, other=said.drop('written')), replicates=10))
    overall = table.filter(task='overall').select('system', 'metric', 'value').rows()
    assert overall == [('base', 'f1', 1.), ('base', 'f1_strict', .5), ('other', 'f1', 1.)]
    read, = readings_table(samples, dict(base=said, other=said.drop('written'))).to_dicts()
    assert read == dict(system='base', answers=2, only_lenient=1, share=.5)


# ---- F1

@pytest.mark.parametrize('gold, pred, f1', [
    (['a', 'b', 'c'], ['b', 'c', 'd'], 2*2/6),
    (['a'], ['a'], 1),
    (['a', 'b'], ['a'], 2/3),
    (['a'], ['b'], 0),
    (['Sodium'], [' sodium ', 'SODIUM'], 1),
    (['a', 'a', 'b'], ['a'], 2/3),
    (['Straße'], ['STRASSE'], 1),
    (['a'], [], 0),
    ([], ['a'], 0),
    ([], [], 1),
    (['a'], None, 0),
    (['a'], ['', '  '], 0),
])
def test_f1_by_hand(gold, pred, f1):
    assert set_f1(gold, pred) == pytest.approx(f1)


# ---- ranking scores

def drawn_rows():
    "Outcome, a risk of seven possible ones, a weight."
    row = st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3))
    return st.lists(row, min_size=2, max_size=60)


@settings(max_examples=150, deadline=None)
@given(drawn_rows())
def test_agrees_with_scikit_learn_where_risks_are_tied(rows):
    gold = np.array([row[0] for row in rows], int)
    risk = np.array([row[1] for row in rows])/6
    if len(set(gold)) == 2:
        assert auroc(gold, risk) == pytest.approx(roc_auc_score(gold, risk))
        assert auprc(gold, risk) == pytest.approx(average_precision_score(gold, risk))


@settings(max_examples=150, deadline=None)
@given(drawn_rows())
def test_agrees_with_scikit_learn_under_weights(rows):
    gold = np.array([row[0] for row in rows], int)
    risk = np.array([row[1] for row in rows])/6
    weights = np.array([row[2] for row in rows])
    if len(set(gold[weights > 0])) == 2:
        weighted = dict(sample_weight=weights)
        assert auroc(gold, risk, weights) == pytest.approx(roc_auc_score(gold, risk, **weighted))
        assert auprc(gold, risk, weights) == pytest.approx(average_precision_score(gold, risk, **weighted))
        assert brier(gold, risk, weights) == pytest.approx(brier_score_loss(gold, risk, pos_label=1, **weighted))


@pytest.mark.parametrize('score', [auroc, auprc, brier])
def test_rows_of_weights_are_repeated_samples(score):
    rng = np.random.default_rng(3)
    gold, risk = rng.integers(0, 2, 80), rng.random(80).round(1)
    weights = rng.integers(0, 4, (5, 80))
    for replicate, row in enumerate(weights):
        again = np.repeat(np.arange(80), row)
        assert score(gold, risk, weights)[replicate] == pytest.approx(score(gold[again], risk[again]))


def test_auroc_by_hand():
    assert auroc([0, 0, 1, 1], [.1, .4, .35, .8]) == .75
    assert auroc([0, 1], [.5, .5]) == .5


@pytest.mark.parametrize('gold, risk', [([1, 1], [.1, .2]), ([], [])])
def test_auroc_without_both_classes_is_undefined(gold, risk):
    assert np.isnan(auroc(gold, risk))


def test_calibration_counts():
    table = calibration([1, 0, 1, 1], [0, .05, .95, 1.])
    assert table['samples'].to_list() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert table['observed'].to_list()[::9] == [.5, 1]
    assert table['mean_risk'][0] == pytest.approx(.025)
    assert table['mean_risk'][1] is None


# ---- predictions beside samples

@pytest.fixture
def decisions():
    return pl.DataFrame(dict(sample_id=['a', 'b'], subject_id=[1, 2], task=['x', 'x'], family=['decision']*2,
                             label=[['p'], ['p']]))


@pytest.fixture
def risks():
    "Samples of one risk task, and a risk for each."
    rng = np.random.default_rng(0)
    happened = rng.random(300) < .4
    samples = pl.DataFrame(dict(
        sample_id=[f't/{i}' for i in range(300)], subject_id=rng.integers(0, 100, 300), task=['t']*300,
        family=['risk']*300, label=[['yes'] if yes else ['no'] for yes in happened]))
    risk = np.clip(.4 + .15*happened + .2*rng.normal(size=300), 0, 1)
    return samples, samples.select('sample_id', 'task', risk=pl.Series(risk))


def test_a_decision_left_out_is_an_empty_answer(decisions):
    one = pl.DataFrame(dict(sample_id=['a'], task=['x'], answer=[['p']]))
    made = score_decision(decisions, one)
    assert made['f1'].to_list() == [1, 0]
    assert made['missing'].to_list() == [False, True]


def test_a_risk_left_out_is_one_half(risks):
    samples, system = risks
    made = score_risk(samples, system.head(200))
    happened = samples['label'].list.first() == 'yes'
    assert made['samples'].item() == 300
    assert made['missing'].item() == 100
    assert made['auroc'].item() == pytest.approx(roc_auc_score(happened, [*system['risk'][:200], *[.5]*100]))


MIXED_UP = {
    'fit no sample': lambda system: system.with_columns(sample_id=pl.col('sample_id') + 'x'),
    'more than once': lambda system: pl.concat([system, system.head(1)]),
    'risk 1.2 of sample': lambda system: system.with_columns(risk=pl.lit(1.2)),
    'risk nan of sample': lambda system: system.with_columns(risk=pl.lit(float('nan'))),
    'no column risk': lambda system: system.drop('risk'),
}


@pytest.mark.parametrize('message', MIXED_UP)
def test_mixed_up_predictions_are_refused(risks, message):
    samples, system = risks
    with pytest.raises(ValueError, match=message):
        score_risk(samples, MIXED_UP[message](system))


def test_a_label_that_is_no_answer_is_refused(risks):
    samples, system = risks
    with pytest.raises(ValueError, match='neither yes nor no'):
        match_risk(samples.with_columns(label=pl.lit(['maybe'])), system)
