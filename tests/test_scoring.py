"""Scores: definitions by hand, agreement with scikit-learn, and hostile answers."""
import time

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

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
