"Headroom: what is measured before stage 3, which prompts teach something, and when stage 3 is not run."
import math
from types import SimpleNamespace

import polars as pl
import pytest

from ehr_r1.config import Run
from ehr_r1.pipeline import Reproduction, lacking
from ehr_r1.profiles import PROFILES, profile
from ehr_r1.stages import build
from ehr_r1.training import headroom, reinforcing
from ehr_r1.training.examples import EXAMPLES
from ehr_r1.training.headroom import BEST_OF, HEADROOM, headroom_by_task, mean_headroom, measure_headroom
from ehr_r1.training.models import new_model, train_tokenizer

S = SimpleNamespace(seed=7, answer_tokens=6)


def thought(body):
    return f'<think>\n## Extraction\n\n## Reasoning\n\n## Final Results\n{body}\n</think>\n\n{body}'


def example(number, family='decision', label=('Sodium',), mode='think'):
    row = dict(sample_id=f's{number}', task='labevents', family=family, mode=mode, prompt=f'prompt {number}')
    return row | dict(answer='', label=list(label), tokens=1, answer_tokens=1, dropped=0)


@pytest.fixture
def model(tmp_path):
    "A folder of a tiny model."
    tokenizer = train_tokenizer(['Sodium\nPotassium\nyes\nno\n']*9, 300)
    folder = tmp_path/'model'
    tokenizer.save_pretrained(folder)
    new_model('tiny', tokenizer, 1, 64).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    "Six prompts, of which the odd ones get answers that differ."
    folder = tmp_path/'prompts'
    folder.mkdir()
    rows = [example(number) for number in range(6)]
    pl.DataFrame(rows, EXAMPLES).write_parquet(folder/'examples-00000.parquet')
    return folder


@pytest.fixture
def scripted(monkeypatch):
    "A model whose answers are known."
    asked = []

    def answers(model, tokenizer, prompts, k, longest, seed, **how):
        asked.extend(prompts)
        differ = {name: int(name[1:]) % 2 for name in prompts}
        return {name: [thought('Sodium')]*(k - odd) + [thought('Chloride')]*odd for name, odd in differ.items()}

    monkeypatch.setattr(headroom, 'sample_answers', answers)
    monkeypatch.setattr(headroom, 'ASKED_TOGETHER', 2)
    return asked


def test_prompts_are_asked_until_enough_differ(model, prompts, scripted):
    found = measure_headroom(model, prompts, 'train', 2, S)
    assert found['sample_id'].to_list() == ['s0', 's1', 's2', 's3']
    assert found['spread'].to_list() == [False, True, False, True]
    assert found['best'].to_list() == [1.]*4
    assert found['mean'].to_list() == [1., 1 - 1/BEST_OF]*2


def test_parts_ask_every_prompt_once(model, prompts, scripted):
    parts = [measure_headroom(model, prompts, 'tuning', 6, S, (part, 2)) for part in range(2)]
    assert sorted(scripted) == [f's{number}' for number in range(6)]
    whole = measure_headroom(model, prompts, 'tuning', 6, S)
    assert pl.concat(parts).sort('sample_id').equals(whole)


def test_a_format_that_differs_teaches_too():
    good, bad = thought('Chloride'), 'Chloride'
    assert headroom.earned([good, bad], example(0))['spread']
    assert not headroom.earned([bad, bad], example(0))['spread']


def measured(rows):
    names = ('sample_id', 'task', 'family', 'split', 'mean', 'best', 'spread')
    return pl.DataFrame([dict(zip(names, row)) for row in rows], HEADROOM)


def test_the_mean_is_over_tasks_of_decisions_of_tuning_patients():
    rows = measured([
        ('a', 'labs', 'decision', 'tuning', .2, .4, True),
        ('b', 'labs', 'decision', 'tuning', .4, .4, False),
        ('c', 'drugs', 'decision', 'tuning', .1, .6, True),
        ('d', 'death', 'risk', 'tuning', .5, 1., True),
        ('e', 'drugs', 'decision', 'train', 0., 1., True)])
    assert mean_headroom(rows) == pytest.approx((.1 + .5)/2)
    by_task = headroom_by_task(rows).filter(task='labs').row(0, named=True)
    assert by_task['prompts'] == 2 and by_task['spread'] == .5
    assert math.isnan(mean_headroom(rows.filter(pl.col('split') == 'train')))


@pytest.mark.parametrize('gain', [0., .019, math.nan])
def test_without_headroom_stage_3_is_not_run(tmp_path, monkeypatch, capsys, gain):
    run = Run('r', tmp_path)
    monkeypatch.setattr(reinforcing, 'build_plan', lambda *_: pytest.fail('it was trained'))
    monkeypatch.setattr(reinforcing, 'build_headroom', lambda run, p: build(
        run.headroom, lambda out: dict(headroom=gain), {}, {}, 'training.reinforcing'))
    assert reinforcing.build_reinforced(run, profile('study')) is None
    assert 'not run' in capsys.readouterr().out
    assert 'nothing to gain' in lacking(SimpleNamespace(trains=True, reasons=True), 'reinforce')


def test_with_headroom_the_prompts_that_teach_are_asked(tmp_path, monkeypatch):
    run, plans = Run('r', tmp_path), []
    monkeypatch.setattr(reinforcing, 'build_plan', lambda run, p, plan: plans.append(plan))
    monkeypatch.setattr(reinforcing, 'build_headroom', lambda run, p: build(
        run.headroom, lambda out: dict(headroom=.1), {}, {}, 'training.reinforcing'))
    reinforcing.build_reinforced(run, profile('study'))
    assert plans[0].measured
    plans.clear()
    reinforcing.build_reinforced(run, profile('smoke'))
    assert not plans[0].measured


def test_profiles_that_plumb_do_not_measure():
    measuring = {name for name, p in PROFILES.items() if p.least_headroom}
    assert measuring == {'demo', 'study', 'pretraining'}


def test_real_tables_get_a_model_that_learns_their_words(tmp_path):
    assert Reproduction('demo', home=tmp_path).profile.model == 'kept'
    assert Reproduction('demo', data=str(tmp_path), home=tmp_path).profile.model == 'small'
    asked = Reproduction('demo', data=str(tmp_path), home=tmp_path, model='kept')
    assert asked.profile.model == 'kept'
