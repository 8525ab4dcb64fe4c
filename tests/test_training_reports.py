"The reports on training: what they say of a run with models, of one without, and what credentialed data must not show."
import json
import math
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd
import polars as pl
import pytest

from ehr_r1.config import Run
from ehr_r1.data.samples import read_samples
from ehr_r1.data.tasks import TASKS
from ehr_r1.evaluation.answers import predictions_of
from ehr_r1.evaluation.benchmark import read_answers, score_run
from ehr_r1.evaluation.judging import asked_records, judge, judge_answers
from ehr_r1.evaluation.reporting import SMALLEST, run_report
from ehr_r1.evaluation.results import Results, better, mean_over_patients, no_worse, reaches, training_order
from ehr_r1.pipeline import Reproduction
from ehr_r1.scoring import set_f1
from ehr_r1.synthesis.support import read_record
from ehr_r1.training.examples import EXAMPLES, Writer
from ehr_r1.training.headroom import HEADROOM
from ehr_r1.training.models import train_tokenizer
from ehr_r1.training.record_texts import quotes

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/'nbs'/'11_reports'
NAMES = ('05_training', '06_stages', '07_reasoning')
FIGURES = (
    'training_loss', 'training_copying', 'training_headroom', 'training_rewards', 'stages', 'stages_chains',
    'stages_decisions', 'stages_risks', 'reasoning_grid', 'reasoning_chains', 'reasoning_scaling')
SETTINGS = dict(profile='smoke', run='r', seed=42)
CONTEXT, ANSWER = 300, 160
LOCAL_PATH = re.compile(r'(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+')
COUNTING = {
    'samples', 'patients', 'positives', 'negatives', 'examples', 'cut', 'dropped_events', 'chains', 'records_cut',
    'answered', 'empty', 'unclosed'}


def said(path):
    "All that an executed report shows."
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    return '\n'.join(json.dumps(output, ensure_ascii=False) for output in outputs)


def execute(home, folder, names=NAMES):
    "Reports of these names, two at a time."
    folder.mkdir(exist_ok=True)

    def make(name):
        run_report(FOLDER/f'{name}.ipynb', folder, SETTINGS, home)

    with pytest.MonkeyPatch.context() as patch:  # set for all threads, so that none takes it away from another
        patch.setenv('EHR_R1_HOME', str(home))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(make, names))
    return folder


# -- a run with invented models

def write_json(path, content):
    path.write_text(json.dumps(content))


def write_lines(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def copying_lines(steps, copy):
    "What stage 0 measures before and after its training."
    before = dict(step=0, seconds=.1, copy=.01, copy_numbers=0.)
    after = dict(step=steps, seconds=9., copy=copy, copy_numbers=.3)
    return before, after


def reward_line(step, steps):
    "What a step of reinforcement learning measures; the reward rises from step to step."
    share = step/steps
    lengths = {
        'completions/mean_length': 50.,
        'completions/max_length': 90.,
        'completions/min_length': 9.,
        'completions/clipped_ratio': .1}
    rewards = {
        'reward': share,
        'rewards/accuracy/mean': .1,
        'rewards/format/mean': share - .1,
        'frac_reward_zero_std': .5}
    return rewards | lengths


def training_line(step):
    return dict(step=step, seconds=.5*step, loss=4/step, num_tokens=1_000*step)


def training_lines(name, counts):
    "The metrics of a training whose loss falls."
    steps = counts['steps']
    lines = [training_line(step) for step in range(1, steps + 1)]
    if name == 'base':
        before, after = copying_lines(steps, counts['copy'])
        return [before, *lines, after]
    if name == 'reinforced':
        return [line | reward_line(line['step'], steps) for line in lines]
    return lines


def checkpoint(run, name, tokenizer, examples, counts, **params):
    "A checkpoint as a training leaves it, without weights."
    out = run.checkpoints/name
    (out/'examples').mkdir(parents=True)
    tokenizer.save_pretrained(out/'model')
    rows = pl.DataFrame(examples, schema=EXAMPLES, orient='row')
    rows.write_parquet(out/'examples'/'examples-00000.parquet')
    write_lines(out/'metrics.jsonl', training_lines(name, counts))
    write_json(out/'measured.json', dict(seconds=12.5))
    settings = dict(model='tiny', lora=0, context=CONTEXT, answer_tokens=ANSWER, batch=8)
    read = dict(examples=len(examples), tokens=9_000, cut=3, dropped_events=7)
    about = dict(parameters=139_712, first=4., last=4/counts['steps'])
    write_json(out/'manifest.json', dict(key=name, params=settings | params, counts=read | about | counts))


def chain_text(evidence, reasoning, final):
    "A chain of the three sections."
    lines = ['## Extraction', *evidence, '', '## Reasoning', reasoning, '', '## Final Results', *final]
    return '\n'.join(lines)


def probability(label, kept, draw):
    "Of yes; the surer, the more is kept of the right items."
    sign = 2 if label == ['yes'] else -2
    return 1/(1 + math.exp(-(kept*sign + draw.gauss(0, 1))))


def thought_answer(record, body, form, draw):
    "An answer with its chain, some of whose evidence is invented: a line's text and what else is to be told of it."
    evidence = quotes(record, 7)
    if draw.random() < .2:
        evidence.append('**Admission [2199-01-01 00:00]**: never happened 99.5')
    chain = chain_text(evidence, '1. <script>alert(1)</script> follows.', [body])
    if draw.random() < form:
        return dict(text=f'<think>\n{chain}\n</think>\n\n{body}')
    return dict(text=f'<think>\n{chain}', status='unclosed', finish='length')


def decision(row, writer, mode, kept, form, draw):
    "What a line says of a decision."
    _, task, _, label, text = row
    right = [item for item in label if draw.random() < kept]
    body = '\n'.join(right or ['Nothing'])
    if mode != 'think':
        return dict(text=body)
    record = writer.prompt(text, task, 'think')[1]
    return thought_answer(record, body, form, draw)


def written(name, rows, writer, mode, kept, form=1., risks=True):
    "Lines of answers with a known share of the right items, and chains of a known form."
    lines = []
    for row in rows:
        sample_id, task, family, label, _ = row
        draw = random.Random(f"{name.removesuffix('-no_knowledge')} {sample_id}")  # chains without the graph: the same
        line = dict(sample_id=sample_id, task=task, kind=family, mode=mode, digest=f'{name} {sample_id}')
        line |= dict(prompt_tokens=150, status='answered', finish='stop', text='', completion_tokens=1)
        if family != 'risk':
            line |= dict(completion_tokens=40)
            lines.append(line | decision(row, writer, mode, kept, form, draw))
        elif risks:
            p = probability(label, kept, draw)
            lines.append(line | dict(yes=p, no=1 - p, outside=0., p_yes=p))
    return lines


def answers(run, name, rows, writer, mode, kept, form=1., risks=True):
    "Answers of a system as the stage leaves them."
    lines = written(name, rows, writer, mode, kept, form, risks)
    out = run.answers/name
    out.mkdir(parents=True)
    write_lines(out/'answers.jsonl', lines)
    predictions_of(lines).write_parquet(out/'predictions.parquet')
    status = pl.Series([line['status'] for line in lines]).value_counts().rows()
    new_tokens = sum(line['completion_tokens'] for line in lines)
    counts = dict(samples=len(lines), cut=3, status=dict(status))
    counts |= dict(prompt_tokens=150*len(lines), new_tokens=new_tokens)
    params = dict(mode=mode, context=CONTEXT, answer_tokens=ANSWER, style='compact')
    write_json(out/'manifest.json', dict(key=name, params=params, counts=counts))


ASKED = ('sample_id', 'task', 'family', 'label', 'text')


def read_asked(folder):
    "The columns `ASKED` of a folder of samples."
    text = pl.col('messages').list.get(1).struct.field('content').alias('text')
    samples = pl.scan_parquet(sorted(folder.glob('*.parquet')))
    return samples.select('sample_id', 'task', 'family', 'label', text)


def thinking_example(writer, sample):
    "An example that quotes two lines of its record, or None."
    record = writer.prompt(sample['text'], sample['task'], 'think')[1]
    evidence = quotes(record, 1)[:2]
    chain = chain_text(evidence, f"So: {', '.join(sample['label'])}.", sample['label'])
    return writer.example(sample, 'think', chain, 'knowledge')[0]


def leave_checkpoints(run, tokenizer, writer, ins):
    "Every stage, with ablations of the second and a smaller first one."
    asked = [dict(zip(ASKED, row)) for row in ins]
    plain = [writer.example(sample, 'plain')[0] for sample in asked]
    plain = [example for example in plain if example]
    thought = [thinking_example(writer, sample) for sample in asked]
    thought = [example for example in thought if example]
    assert len(plain) > 10
    assert thought
    copied = dict(steps=20, copy=.42, copy_numbers=.3, gate=.8, passed=False)
    checkpoint(run, 'base', tokenizer, plain, copied)
    too_long = {'answer is longer than a model may answer': 12}
    for name, steps in (('adapted-0.5', 10), ('adapted', 20)):
        checkpoint(run, name, tokenizer, plain, dict(steps=steps, left_out=too_long))
    cut_away = {'evidence of the chain was cut away': 4}
    for name in ('reasoned', 'reasoned-plain', 'reasoned-no_knowledge'):
        checkpoint(run, name, tokenizer, thought, dict(steps=20, left_out=cut_away))
    checkpoint(run, 'reinforced', tokenizer, thought, dict(steps=40), prompts=2)


IN_THEIR_MODE = (  # system, mode, share of the right items, share of the chains that are closed
    ('base', 'plain', .02, 1),
    ('adapted-0.5', 'plain', .4, 1),
    ('adapted', 'plain', .7, 1),
    ('reasoned', 'think', .3, .8),
    ('reasoned-plain', 'no_think', .6, 1),
    ('reasoned-no_knowledge', 'think', .3, .8),
    ('reinforced', 'think', .8, 1))
IN_THE_OTHER_MODE = (
    ('reasoned.no_think', 'no_think', .5),
    ('reinforced.no_think', 'no_think', .6),
    ('reasoned-plain.think', 'think', .2))


def leave_answers(run, writer, bench):
    for name, mode, kept, form in IN_THEIR_MODE:
        answers(run, name, bench, writer, mode, kept, form)
    for name, mode, kept in IN_THE_OTHER_MODE:
        answers(run, name, bench, writer, mode, kept, risks=False)


def other_systems(writer, bench):
    "Predictions of baselines and ceiling: name -> frame."
    has_risk = pl.col('risk').is_not_null()
    invented = (
        ('majority', .15, .5),
        ('frequency', .2, .5),
        ('logistic', .5, pl.col('risk')),
        ('logistic_seen', .4, pl.col('risk')),
        ('ceiling', 1., pl.col('risk')))
    others = {}
    for name, kept, risk in invented:
        predictions = predictions_of(written(name, bench, writer, 'plain', kept))
        others[name] = predictions.with_columns(risk=pl.when(has_risk).then(risk))
    others['ceiling'] = others['ceiling'].filter(has_risk)
    return others


def leave_headroom(run, tasks):
    "Two prompts a task: the best of eight answers is .3 better than their mean; a prompt of two teaches nothing."
    asked = product(tasks, ('tuning', 'train'), range(2))
    earned = dict(family='decision', mean=.2, best=.5)
    rows = [earned | dict(sample_id=f'{task}-{number}', task=task, split=split, spread=not number)
            for task, split, number in asked]
    run.headroom.mkdir()
    pl.DataFrame(rows, HEADROOM).write_parquet(run.headroom/'headroom.parquet')
    params = dict(least_headroom=.02)
    write_json(run.headroom/'manifest.json', dict(key='h', params=params, counts=dict(headroom=.3, prompts=len(rows))))


def leave_scores(run, profile, others):
    "Scores, and means over the tasks with enough samples."
    samples = read_samples(run, profile).filter(pl.col('split') == 'held_out')
    of_the_42 = {name for name, task in TASKS.items() if task.in_42}
    with pytest.MonkeyPatch.context() as patch:  # of so few patients no task has thirty answers of each kind
        patch.setattr('ehr_r1.intervals.ENOUGH', 1)
        score_run(samples, others | read_answers(run), run.scores, of_the_42, 42, 20, 'models_')
    write_json(run.scores/'manifest.json', dict(key='s', params=dict(seed=42, replicates=20)))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A small synthetic hospital with invented models: scores known to rise from stage to stage, but for stage 2."
    sizes = dict(patients=120, shard_patients=60, replicates=20, ins_per_task=40, style='compact')
    r = Reproduction('smoke', run='r', home=tmp_path_factory.mktemp('home'), **sizes)
    r.make('hospital', 'trajectories', 'index', 'samples')
    bench = read_asked(r.run.samples/'ehr_bench').collect().rows()
    decisions = read_asked(r.run.samples/'ehr_ins').filter(family='decision')
    ins = decisions.head(40).collect().rows()
    texts = [text for *_, text in ins]
    tokenizer = train_tokenizer([*texts, 'yes', 'no'], 700)
    writer = Writer(tokenizer, CONTEXT, ANSWER, 'compact')
    leave_checkpoints(r.run, tokenizer, writer, ins)
    leave_headroom(r.run, sorted({task for _, task, *_ in ins}))
    leave_answers(r.run, writer, bench)
    leave_scores(r.run, r.profile, other_systems(writer, bench))
    return r.run.folder.parent.parent


@pytest.fixture(scope='module')
def reported(home):
    return execute(home, home/'out')


def test_figures_stand_in_two_forms(reported):
    names = {path.name for path in reported.iterdir()}
    for name in FIGURES:
        assert {f'{name}.png', f'{name}.svg'} <= names


every_report = pytest.mark.parametrize('name', NAMES)


@every_report
def test_report_is_whole(reported, name):
    path = reported/f'{name}.ipynb'
    text = said(path)
    assert 'run: r (profile smoke, seed 42)' in text
    assert '"stderr"' not in text
    assert path.stat().st_size < 1024*1024


@every_report
def test_report_shows_no_missing_number(reported, name):
    text = said(reported/f'{name}.ipynb')
    without_images = re.sub(r'[\w/+]{60,}', '', text).replace('\\n', '\n')
    assert not re.search(r'\bnan\b', without_images)


@every_report
def test_report_shows_no_path_of_this_computer(reported, home, name):
    text = said(reported/f'{name}.ipynb')
    assert not LOCAL_PATH.search(text)
    assert str(home) not in text
    assert sys.prefix not in text


def test_training_says_what_was_trained_on(reported):
    table = pd.read_csv(reported/'training.csv').set_index('system')
    assert list(table.index) == [
        'base', 'adapted-0.5', 'adapted', 'reasoned-no_knowledge', 'reasoned-plain', 'reasoned', 'reinforced']
    adapted = table.loc['adapted']
    assert adapted.sequences == 160
    assert adapted.tokens == 20_000
    assert adapted.tokens_per_second == 2_000
    assert pd.isna(table.last_loss['reinforced'])


def test_training_says_what_was_left_out(reported):
    assert set(pd.read_csv(reported/'training_left_out.csv').samples) == {12, 4}


def test_training_says_that_the_gate_is_not_passed(reported):
    text = said(reported/'05_training.ipynb')
    assert 'The gate, 80%, is not passed' in text
    assert 'After 20,000 tokens and 9 seconds (20 steps) the model copies 42.0%' in text
    assert 'before training it was 1.0%' in text


def test_training_says_what_stage_3_could_gain(reported):
    text = said(reported/'05_training.ipynb')
    assert 'the best of eight is **0.300** better than their mean' in text
    assert '50% had answers that all earned the same' in text
    table = pd.read_csv(reported/'training_headroom.csv')
    assert set(table.headroom.round(6)) == {.3}
    assert set(table.spread) == {.5}


def test_training_says_that_the_reward_grows(reported):
    text = said(reported/'05_training.ipynb')
    assert 'reward: 0.138 in the first quarter, 0.887 in the last' in text
    assert 'Higher: yes.' in text


def test_examples_mark_what_is_learnt(reported):
    for name in ('adapted', 'reasoned'):
        page = (reported/f'example_{name}.html').read_text()
        assert 'class="loss"' in page
        assert 'class="seen"' in page
    page = (reported/'example_reasoned.html').read_text()
    learnt = re.findall(r'class="loss"[^>]*>([^<]*)<', page)
    assert '## ' in ''.join(learnt)


def test_answers_are_shown_escaped(reported):
    text = said(reported/'05_training.ipynb')
    assert text.count('<h4>') == 3
    assert '<script>' not in text
    assert '&lt;script&gt;' in text
    assert '✓' in text


def test_expected_effects_are_judged_by_their_intervals(reported):
    table = pd.read_csv(reported/'stages_effects.csv')
    shows = dict(zip(table.measured, table.shows))
    assert shows['F1, adapted minus frequency'] == 'yes'
    assert shows['F1, adapted minus majority'] == 'yes'
    assert shows['held-out reward, reinforced minus reasoned'] == 'yes'
    assert shows['F1, reasoned minus adapted'] == 'no, it is worse'
    assert shows['share valid, reasoned'].startswith('no')
    assert shows['F1, reinforced minus reasoned'] == 'yes, and better'


def test_effects_are_told(reported):
    text = said(reported/'06_stages.ipynb')
    assert 'Stage 2 is at least as good as stage 1 on decisions: no, it is worse.' in text
    assert 'Stage 0 did not pass its gate' in text


def test_every_baseline_and_the_tasks_in_the_means_are_told(reported):
    table = pd.read_csv(reported/'stages_overall.csv').set_index('system')
    assert {'frequency', 'logistic', 'logistic_seen'} <= set(table.index)
    assert table.decision_tasks.dropna().nunique() == 1
    assert table.decision_tasks.max() > 5
    against = pd.read_csv(reported/'stages_against.csv')
    assert {'logistic', 'logistic_seen'} <= set(against.second)
    assert 'logistic_seen' in set(pd.read_csv(reported/'reasoning.csv').system)


def test_effects_are_differences_of_scores(reported):
    scores = pd.read_csv(reported/'stages.csv')
    overall = scores[(scores.task == 'overall') & (scores.metric == 'f1')]
    f1 = overall.set_index('system').value
    effects = pd.read_csv(reported/'stages_effects.csv')
    row = effects[effects.measured == 'F1, reasoned minus adapted'].iloc[0]
    assert row.value == pytest.approx(f1['reasoned'] - f1['adapted'], abs=2e-4)
    assert row.low <= row.value <= row.high < 0


def test_published_systems_stand_apart(reported):
    scored = set(pd.read_csv(reported/'stages.csv').system)
    published = set(pd.read_csv(reported/'stages_published.csv').system)
    assert not {'EHR-R1-8B', 'GPT-4o'} & scored
    assert 'EHR-R1-8B' in published


# -- its chains, of stage 2

@pytest.fixture(scope='module')
def lines(home, reported):
    "Answers: sample -> line."
    found = read_lines(Run('r', home).answers/'reasoned'/'answers.jsonl')
    return {line['sample_id']: line for line in found}


@pytest.fixture(scope='module')
def unclosed(lines):
    "Samples whose chain has no end."
    return {sample for sample, line in lines.items() if line['status'] == 'unclosed'}


@pytest.fixture(scope='module')
def records(home, reported):
    return asked_records(Run('r', home), 'reasoned')


@pytest.fixture(scope='module')
def judged(home, records):
    return judge_answers(Run('r', home), 'reasoned', records)


def test_unclosed_chains_are_told(judged, unclosed):
    told = judged.filter(fault='think block not closed')
    assert unclosed
    assert set(told['sample_id']) == unclosed


def test_chains_with_invented_evidence_are_not_sound(judged, lines):
    invented = {sample for sample, line in lines.items() if 'never happened' in line['text']}
    assert invented
    assert not judged.filter(pl.col('sample_id').is_in(invented))['sound'].any()


def answer_lines(text):
    after = text.split('</think>')[-1]
    return [line for line in after.split('\n') if line]


def test_accuracy_is_f1_of_the_answer(judged, lines, unclosed, records):
    for row in judged.head(30).iter_rows(named=True):
        sample = row['sample_id']
        gold = records[sample][1]
        f1 = set_f1(gold, answer_lines(lines[sample]['text']))
        assert row['accuracy'] == pytest.approx(0 if sample in unclosed else f1)


def test_chains_are_counted_by_what_is_wrong(reported, judged, unclosed):
    table = pd.read_csv(reported/'stages_faults.csv')
    chains = table[table.system == 'reasoned'].set_index('chain').chains
    assert chains['think block not closed'] == len(unclosed)
    assert chains.sum() == len(judged)
    assert chains['sound'] == judged['sound'].sum()


@pytest.fixture(scope='module')
def invalid(reported):
    "Tasks with invalid chains."
    table = pd.read_csv(reported/'stages_invalid.csv')
    return table[table.system == 'reasoned'].set_index('task')


def test_invalid_chains_are_counted_by_task(reported, judged, invalid):
    bad = judged.filter(~pl.col('valid')).group_by('task').len()
    assert invalid.invalid.to_dict() == dict(bad.rows())
    assert (invalid.ehr_ins > 0).all()
    assert (invalid.answer_lines >= 1).all()
    assert f'invalid chains are of {invalid.index[0]}' in said(reported/'06_stages.ipynb')


def final_list(line):
    "The items a chain ends with, but for the last where the chain was cut off."
    chain = line['text'].split('</think>')[0]
    items = chain.split('## Final Results\n')[1].strip().split('\n')
    return frozenset(items[:-1] if line['status'] == 'unclosed' else items)


def test_lists_that_chains_end_with_are_counted_once(invalid, lines):
    decisions = [line for line in lines.values() if line['kind'] == 'decision']
    ends = {(line['task'], final_list(line)) for line in decisions}
    counted = {task: sum(task == other for other, _ in ends) for task in invalid.index}
    assert invalid.lists.to_dict() == counted
    assert (invalid.lists < invalid.chains).any()


def test_ablations_stand_beside_the_paper(reported):
    grid = pd.read_csv(reported/'reasoning_grid.csv')
    assert list(grid.system) == ['reasoned-plain', 'reasoned-plain.think', 'reasoned.no_think', 'reasoned']
    assert grid.value.notna().all()
    assert list(grid.paper.dropna()) == [.506, .5438]


def test_ablations_are_judged(reported):
    text = said(reported/'07_reasoning.ipynb')
    assert "Ours shows the opposite of the paper's effect." in text
    assert '0.5060 to 0.5438' in text
    assert 'The graph has no established effect on F1 here' in text
    assert 'The three sections: open.' in text


def test_scaling_is_judged(reported):
    assert 'F1 grows with the data' in said(reported/'07_reasoning.ipynb')
    assert list(pd.read_csv(reported/'reasoning_scaling.csv').samples_read) == [70, 140]


# -- runs that lack something

def copied(home, folder):
    "The run elsewhere, to be changed."
    shutil.copytree(home/'runs', folder/'runs')
    return Run('r', folder)


def take_away_chains(run):
    "Stages 2 and 3, the ablations, and what was scored of them."
    for folder in (run.checkpoints, run.answers):
        for path in list(folder.iterdir()):
            if path.name.startswith('re') or '-' in path.name:
                shutil.rmtree(path)
    names = pl.col('^(system|first|second)$')
    gone = pl.any_horizontal(names.str.contains('^re|-'))
    for name in ('scores', 'comparisons'):
        path = run.scores/f'models_{name}.parquet'
        pl.read_parquet(path).filter(~gone).write_parquet(path)


def take_away_stage_0(run, model):
    "A base model that was there before."
    base = run.checkpoints/'base'
    (base/'metrics.jsonl').unlink()
    shutil.rmtree(base/'examples')
    counts = dict(checkpoint=str(model), parameters=5)
    write_json(base/'manifest.json', dict(key='b', params=dict(model='some/model'), counts=counts))


@pytest.fixture(scope='module')
def lacking(home, tmp_path_factory):
    "Home of a run without chains and without stage 0, reported."
    elsewhere = tmp_path_factory.mktemp('lacking')
    run = copied(home, elsewhere)
    take_away_chains(run)
    take_away_stage_0(run, elsewhere/'my-model')
    execute(elsewhere, elsewhere/'out')
    return elsewhere


@pytest.fixture(scope='module')
def too_few(home, tmp_path_factory):
    "Reports of the same run where no task has enough samples to enter a mean."
    elsewhere = tmp_path_factory.mktemp('too_few')
    run = copied(home, elsewhere)
    for name in ('models_scores', 'models_comparisons'):
        table = pl.read_parquet(run.scores/f'{name}.parquet')
        table.filter(pl.col('task') != 'overall').write_parquet(run.scores/f'{name}.parquet')
    return execute(elsewhere, elsewhere/'out', NAMES[1:])


def test_stages_say_that_no_task_enters_a_mean(too_few):
    text = said(too_few/'06_stages.ipynb')
    assert 'fewer than 30 samples among those asked: their scores say little, and are in no mean' in text
    assert 'adapted minus base' not in text
    assert pd.read_csv(too_few/'stages_overall.csv').F1.isna().all()


def test_reasoning_stands_without_means(too_few):
    assert 'Open.' in said(too_few/'07_reasoning.ipynb')


def test_training_says_what_a_run_lacks(lacking):
    text = said(lacking/'out'/'05_training.ipynb')
    assert 'the checkpoint my-model' in text
    assert str(lacking) not in text
    assert 'reasoned, reinforced are missing' in text
    assert 'there was no stage 0' in text


def test_stages_say_what_a_run_lacks(lacking):
    text = said(lacking/'out'/'06_stages.ipynb')
    assert 'open: not measured in this run, or not to be told' in text
    assert 'No model that thinks has answered' in text


def test_reasoning_says_what_a_run_lacks(lacking):
    text = said(lacking/'out'/'07_reasoning.ipynb')
    assert 'No model of stage 2 stands in this run' in text
    assert '**Open.** One size of stage 1' in text


# -- credentialed data

@pytest.fixture(scope='module')
def credentialed(home, tmp_path_factory):
    "Reports of the same run, were it of credentialed data."
    elsewhere = tmp_path_factory.mktemp('credentialed')
    path = copied(home, elsewhere).trajectories/'manifest.json'
    manifest = json.loads(path.read_text())
    manifest['counts'] |= dict(access='credentialed', source='unknown')
    write_json(path, manifest)
    return execute(elsewhere, elsewhere/'out', NAMES[:2])


def test_credentialed_data_show_no_small_count(credentialed):
    seen = hidden = 0
    for path in credentialed.glob('*.csv'):
        table = pl.read_csv(path, infer_schema_length=None)
        counts = [column for column in table if column.name in COUNTING]
        for column in counts:
            small = column.cast(pl.Int64).is_between(1, SMALLEST - 1)
            assert not small.any(), f'{path.name}: {column.name}'
            seen += column.count()
            hidden += column.null_count()
    assert seen > 20
    assert hidden > 20


@pytest.mark.parametrize('name', NAMES[:2])
def test_credentialed_data_show_no_sample(credentialed, name):
    text = said(credentialed/f'{name}.ipynb')
    assert 'access: credentialed' in text
    assert 'sample_id' not in text
    assert not re.search(r'1\d{7}-\w+-\d+', text)
    assert '<h4>' not in text


def test_credentialed_data_show_no_example(credentialed):
    assert not list(credentialed.glob('*.html'))
    assert 'no example is shown' in said(credentialed/'05_training.ipynb')


# -- what the reports share

def number(value, low, high):
    return dict(value=value, low=low, high=high)


def test_a_gain_is_judged_by_its_interval():
    assert better(number(.1, .01, .2)) == 'yes'
    assert better(number(.1, 0., .2)).startswith('no, not established')
    assert better(number(-.1, -.2, -.01)) == 'no, the opposite shows'


def test_a_loss_is_judged_by_its_interval():
    assert no_worse(number(.1, .01, .2)) == 'yes, and better'
    assert no_worse(number(.1, -.05, .2)).endswith('a loss of 0.050')
    assert no_worse(number(-.1, -.3, .1)).startswith('open')
    assert no_worse(number(-.1, -.2, -.01)) == 'no, it is worse'


def test_a_share_is_judged_by_its_interval():
    assert reaches(number(.97, .96, .98), .95) == 'yes'
    assert reaches(number(.94, .9, .96), .95) == 'no, though the interval reaches it'
    assert reaches(number(.5, .4, .6), .95) == 'no'


def test_what_is_not_measured_is_open():
    assert better(None).startswith('open')
    assert no_worse(None).startswith('open')
    assert reaches(None, .95).startswith('open')


def test_without_an_interval_all_is_open():
    nan = float('nan')
    assert better(number(.1, None, None)).startswith('open')
    assert no_worse(number(.1, nan, nan)).startswith('open')


@pytest.fixture
def two_systems():
    "Scores of a, and of b, which has none, and their difference."
    about = dict(first='a', second='b', task='overall', metric='f1')
    values = dict(difference=.2, low=.1, high=.4, p=.01, samples=9, patients=3, tasks=2)
    scored = dict(metric='f1', task='overall', low=.1, high=.4, samples=9, positives=None)
    scores = pd.DataFrame(dict(system=['a', 'b'], value=[.3, None]) | scored)
    return Results(scores, pd.DataFrame([about | values]))


def test_differences_keep_their_sign_whichever_way_they_were_made(two_systems):
    assert two_systems.difference('a', 'b', 'f1')['low'] == .1
    turned = two_systems.difference('b', 'a', 'f1')
    assert (turned['low'], turned['high']) == (-.4, -.1)


def test_what_is_not_known_is_none(two_systems):
    assert two_systems.difference('a', 'c', 'f1') is None
    assert two_systems.score('b', 'f1') is None
    assert two_systems.score('a', 'f1')['value'] == .3


def test_a_mean_over_one_patient_has_no_interval():
    mean = mean_over_patients([1, 0], [5, 5], 1, 100)
    assert mean == dict(value=.5, low=None, high=None, samples=2, patients=1)


def test_a_mean_over_patients_has_an_interval():
    mean = mean_over_patients([1]*50 + [0]*50, range(100), 1, 500)
    assert mean['low'] == pytest.approx(.4, abs=.04)
    assert mean['high'] == pytest.approx(.6, abs=.04)


HOSTILE = dict(
    empty='',
    closed='</think>',
    opened='<think>'*5,
    surrogate='\ud800',
    repeated='<think>\n## Extraction\n' + '**A [b]**: c\n'*1000,
    long='x'*10**6)


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_answers_are_judged(kind):
    judged = judge(HOSTILE[kind], ['a'], read_record('', 'compact'))
    assert judged['fault']
    assert not judged['sound']
    assert judged['reward'] <= 0


def test_order_of_training():
    ordered = ['base', 'adapted-0.1', 'adapted', 'reasoned-plain.think', 'reasoned', 'reinforced.no_think']
    mixed = ['reinforced.no_think', 'reasoned-plain.think', 'adapted', 'base', 'adapted-0.1', 'reasoned']
    assert sorted(mixed, key=training_order) == ordered
