"The reports on training: what they say of a run with models, of one without, and what credentialed data must not show."
import json
import math
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
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
from ehr_r1.training.models import train_tokenizer
from ehr_r1.training.record_texts import quotes

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/'nbs'/'reports'
NAMES = ('05_training', '06_stages', '07_reasoning')
SETTINGS = dict(profile='smoke', run='r', seed=42)
CONTEXT, ANSWER = 200, 120

def said(path): # all that an executed report shows
    nb = nbformat.read(path, as_version=4)
    return '\n'.join(json.dumps(o, ensure_ascii=False) for c in nb.cells for o in c.get('outputs', []))

def execute(home, folder, names=NAMES):
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch: # set for all threads, so that none takes it away from another
        patch.setenv('EHR_R1_HOME', str(home))
        with ThreadPoolExecutor(2) as pool: list(pool.map(lambda name: run_report(FOLDER/f'{name}.ipynb', folder, SETTINGS, home), names))
    return folder

def checkpoint(run, name, tokenizer, examples, counts, **params):
    "A checkpoint as a training leaves it, without weights."
    out = run.checkpoints/name
    (out/'examples').mkdir(parents=True); tokenizer.save_pretrained(out/'model')
    pl.DataFrame(examples, schema=EXAMPLES, orient='row').write_parquet(out/'examples'/'examples-00000.parquet')
    steps = counts['steps']
    lines = [dict(step=s, seconds=.5*s, loss=4/s, num_tokens=1_000*s) for s in range(1, steps + 1)]
    if name == 'base': lines = [dict(step=0, seconds=.1, copy=.01, copy_numbers=0.), *lines, dict(step=steps, seconds=9., copy=counts['copy'], copy_numbers=.3)]
    if name == 'reinforced':
        for l in lines: l |= {'reward': l['step']/steps, 'rewards/accuracy/mean': .1, 'rewards/format/mean': l['step']/steps - .1, 'completions/mean_length': 50., 'completions/max_length': 90.,
                              'completions/min_length': 9., 'completions/clipped_ratio': .1, 'frac_reward_zero_std': .5}
    (out/'metrics.jsonl').write_text(''.join(json.dumps(l) + '\n' for l in lines))
    (out/'measured.json').write_text(json.dumps(dict(seconds=12.5)))
    params = dict(model='tiny', lora=0, context=CONTEXT, answer_tokens=ANSWER, batch=8) | params
    about = dict(examples=len(examples), tokens=9_000, cut=3, dropped_events=7, parameters=139_712, first=4., last=4/steps)
    (out/'manifest.json').write_text(json.dumps(dict(key=name, params=params, counts=about | counts)))

def written(name, rows, writer, mode, kept, form=1., risks=True):
    "Lines of answers with a known share of the right items, and chains of a known form."
    lines = []
    for sample_id, task, family, label, text in rows:
        draw = random.Random(f"{name.removesuffix('-no_knowledge')} {sample_id}") # chains without the graph come out the same
        line = dict(sample_id=sample_id, task=task, kind=family, mode=mode, digest=f'{name} {sample_id}', prompt_tokens=150, status='answered', finish='stop', text='', completion_tokens=1)
        if family == 'risk':
            if not risks: continue
            p = 1/(1 + math.exp(-(kept*(2 if label == ['yes'] else -2) + draw.gauss(0, 1))))
            lines.append(line | dict(yes=p, no=1 - p, outside=0., p_yes=p)); continue
        body = '\n'.join([l for l in label if draw.random() < kept] or ['Nothing'])
        if mode == 'think':
            evidence = quotes(writer.prompt(text, task, 'think')[1], 7) + (['**Admission [2199-01-01 00:00]**: never happened 99.5'] if draw.random() < .2 else [])
            chain = '\n'.join(['## Extraction', *evidence, '', '## Reasoning', '1. <script>alert(1)</script> follows.', '', '## Final Results', body])
            closed = draw.random() < form
            body = f'<think>\n{chain}\n</think>\n\n{body}' if closed else f'<think>\n{chain}'
            if not closed: line |= dict(status='unclosed', finish='length')
        lines.append(line | dict(text=body, completion_tokens=40))
    return lines

def answers(run, name, rows, writer, mode, *how, **more):
    "Answers of a system as the stage leaves them."
    lines, out = written(name, rows, writer, mode, *how, **more), run.answers/name
    out.mkdir(parents=True)
    (out/'answers.jsonl').write_text(''.join(json.dumps(l) + '\n' for l in lines))
    predictions_of(lines).write_parquet(out/'predictions.parquet')
    status = pl.Series([l['status'] for l in lines]).value_counts().rows()
    counts = dict(samples=len(lines), cut=3, status=dict(status), prompt_tokens=150*len(lines), new_tokens=sum(l['completion_tokens'] for l in lines))
    (out/'manifest.json').write_text(json.dumps(dict(key=name, params=dict(mode=mode, context=CONTEXT, answer_tokens=ANSWER, style='compact'), counts=counts)))

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A small synthetic hospital with invented models whose scores are known to rise from stage to stage, but for stage 2."
    r = Reproduction('smoke', run='r', home=tmp_path_factory.mktemp('home'), patients=120, shard_patients=60, replicates=20, ins_per_task=40)
    for stage in ('hospital', 'trajectories', 'index', 'samples'): getattr(r, stage)()
    run, text = r.run, pl.col('messages').list.get(1).struct.field('content')
    bench = pl.scan_parquet(sorted((run.samples/'ehr_bench').glob('*.parquet'))).select('sample_id', 'task', 'family', 'label', text).collect().rows()
    ins = pl.scan_parquet(sorted((run.samples/'ehr_ins').glob('*.parquet'))).filter(family='decision').select('sample_id', 'task', 'family', 'label', text).head(40).collect().rows()
    tokenizer = train_tokenizer([t for *_, t in ins] + ['yes', 'no'], 700)
    writer = Writer(tokenizer, CONTEXT, ANSWER, 'compact')
    asked = [dict(zip(('sample_id', 'task', 'family', 'label', 'text'), x)) for x in ins]
    plain = [e for x in asked if (e := writer.example(x, 'plain')[0])]
    chain = lambda x: '\n'.join(['## Extraction', *quotes(writer.prompt(x['text'], x['task'], 'think')[1], 1)[:1], '', '## Reasoning', 'So.', '', '## Final Results', *x['label']])
    thought = [e for x in asked if (e := writer.example(x, 'think', chain(x), 'knowledge')[0])]
    assert len(plain) > 10 and thought
    checkpoint(run, 'base', tokenizer, plain, dict(steps=20, copy=.42, copy_numbers=.3, gate=.8, passed=False))
    for name, steps in (('adapted-0.5', 10), ('adapted', 20)): checkpoint(run, name, tokenizer, plain, dict(steps=steps, left_out={'answer is longer than a model may answer': 12}))
    for name in ('reasoned', 'reasoned-plain', 'reasoned-no_knowledge'): checkpoint(run, name, tokenizer, thought, dict(steps=20, left_out={'evidence of the chain was cut away': 4}))
    checkpoint(run, 'reinforced', tokenizer, thought, dict(steps=40), prompts=2)
    for name, mode, kept, form in (('base', 'plain', .02, 1), ('adapted-0.5', 'plain', .4, 1), ('adapted', 'plain', .7, 1), ('reasoned', 'think', .3, .8), ('reasoned-plain', 'no_think', .6, 1),
                                   ('reasoned-no_knowledge', 'think', .3, .8), ('reinforced', 'think', .8, 1)): answers(run, name, bench, writer, mode, kept, form)
    for name, mode, kept in (('reasoned.no_think', 'no_think', .5), ('reinforced.no_think', 'no_think', .6), ('reasoned-plain.think', 'think', .2)): answers(run, name, bench, writer, mode, kept, risks=False)
    samples = read_samples(run, r.profile).filter(pl.col('split') == 'held_out')
    others = {n: predictions_of(written(n, bench, writer, 'plain', k)).with_columns(risk=pl.when(pl.col('risk').is_not_null()).then(r)) for n, k, r in
              (('majority', .15, .5), ('frequency', .2, .5), ('logistic', .5, pl.col('risk')), ('ceiling', 1., pl.col('risk')))}
    others['ceiling'] = others['ceiling'].filter(pl.col('risk').is_not_null())
    score_run(samples, others | read_answers(run), run.scores, {t for t in TASKS if TASKS[t].in_42}, 42, 20, 'models_')
    (run.scores/'manifest.json').write_text(json.dumps(dict(key='s', params=dict(seed=42, replicates=20))))
    return r.home

@pytest.fixture(scope='module')
def reported(home): return execute(home, home/'out')

# -- a run with models

def test_reports_are_whole(reported, home):
    names = {p.name for p in reported.iterdir()}
    for n in ('training_loss', 'training_copying', 'training_rewards', 'stages', 'stages_chains', 'stages_decisions', 'stages_risks', 'reasoning_grid', 'reasoning_chains', 'reasoning_scaling'):
        assert {f'{n}.png', f'{n}.svg'} <= names
    for name in NAMES:
        text = said(reported/f'{name}.ipynb')
        assert 'run: r (profile smoke, seed 42)' in text and '"stderr"' not in text and 'nan' not in re.sub(r'[\w/+]{60,}', '', text)
        assert not re.search(r'(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+', text) and str(home) not in text and sys.prefix not in text
        assert (reported/f'{name}.ipynb').stat().st_size < 1024*1024

def test_training_says_what_was_trained_on_and_that_the_gate_is_not_passed(reported):
    d = pd.read_csv(reported/'training.csv').set_index('system')
    assert list(d.index) == ['base', 'adapted-0.5', 'adapted', 'reasoned-no_knowledge', 'reasoned-plain', 'reasoned', 'reinforced']
    assert d.sequences['adapted'] == 160 and d.tokens['adapted'] == 20_000 and d.tokens_per_second['adapted'] == 2_000 and pd.isna(d.last_loss['reinforced'])
    assert set(pd.read_csv(reported/'training_left_out.csv').samples) == {12, 4}
    text = said(reported/'05_training.ipynb')
    assert 'The gate, 80%, is not passed' in text and 'After 20,000 tokens and 9 seconds (20 steps) the model copies 42.0%' in text and 'before training it was 1.0%' in text
    assert 'reward: 0.138 in the first quarter, 0.887 in the last' in text and 'Higher: yes.' in text

def test_examples_and_answers_are_shown_escaped(reported):
    for name in ('adapted', 'reasoned'):
        page = (reported/f'example_{name}.html').read_text()
        assert 'class="loss"' in page and 'class="seen"' in page
    assert '## ' in ''.join(re.findall(r'class="loss"[^>]*>([^<]*)<', (reported/'example_reasoned.html').read_text()))
    text = said(reported/'05_training.ipynb')
    assert text.count('<h4>') == 3 and '<script>' not in text and '&lt;script&gt;' in text and '✓' in text

def test_expected_effects_are_judged_by_their_intervals(reported):
    d = pd.read_csv(reported/'stages_effects.csv')
    shows = dict(zip(d.measured, d.shows))
    assert shows['F1, adapted minus frequency'] == 'yes' and shows['F1, adapted minus majority'] == 'yes' and shows['held-out reward, reinforced minus reasoned'] == 'yes'
    assert shows['F1, reasoned minus adapted'] == 'no, it is worse' and shows['share valid, reasoned'].startswith('no') and shows['F1, reinforced minus reasoned'] == 'yes, and better'
    text = said(reported/'06_stages.ipynb')
    assert 'Stage 2 is at least as good as stage 1 on decisions: no, it is worse.' in text and 'Stage 0 did not pass its gate' in text
    scores = pd.read_csv(reported/'stages.csv')
    f1 = scores[(scores.task == 'overall') & (scores.metric == 'f1')].set_index('system').value
    row = d[d.measured == 'F1, reasoned minus adapted'].iloc[0]
    assert row.value == pytest.approx(f1['reasoned'] - f1['adapted'], abs=2e-4) and row.low <= row.value <= row.high < 0
    assert not {'EHR-R1-8B', 'GPT-4o'} & set(scores.system) and 'EHR-R1-8B' in set(pd.read_csv(reported/'stages_published.csv').system)

def test_chains_are_counted_by_what_is_wrong(reported, home):
    run = Run('r', home)
    records = asked_records(run, 'reasoned')
    j = judge_answers(run, 'reasoned', records)
    lines = [json.loads(l) for l in (run.answers/'reasoned'/'answers.jsonl').read_text().splitlines()]
    unclosed = {l['sample_id'] for l in lines if l['status'] == 'unclosed'}
    assert set(j.filter(pl.col('fault') == 'think block not closed')['sample_id']) == unclosed and unclosed
    invented = {l['sample_id'] for l in lines if 'never happened' in l['text']}
    assert invented and not j.filter(pl.col('sample_id').is_in(invented))['sound'].any()
    assert all(x['accuracy'] == pytest.approx(0 if x['sample_id'] in unclosed else set_f1(records[x['sample_id']][1], [l for l in next(y for y in lines if y['sample_id'] == x['sample_id'])['text'].split('</think>')[-1].split('\n') if l]))
               for x in j.head(30).iter_rows(named=True))
    d = pd.read_csv(reported/'stages_faults.csv')
    d = d[d.system == 'reasoned'].set_index('chain').chains
    assert d['think block not closed'] == len(unclosed) and d.sum() == len(j) and d['sound'] == j['sound'].sum()
    tasks = pd.read_csv(reported/'stages_invalid.csv')
    tasks = tasks[tasks.system == 'reasoned'].set_index('task')
    bad = j.filter(~pl.col('valid')).group_by('task').len()
    assert tasks.invalid.to_dict() == dict(bad.rows()) and (tasks.ehr_ins > 0).all() and (tasks.answer_lines >= 1).all()
    assert f'invalid chains are of {tasks.index[0]}' in said(reported/'06_stages.ipynb')
    final = lambda l: l['text'].split('</think>')[0].split('## Final Results\n')[1].strip().split('\n')
    ends = {(l['task'], frozenset(final(l)[:-1] if l['sample_id'] in unclosed else final(l))) for l in lines if l['kind'] == 'decision'}
    assert tasks.lists.to_dict() == {t: sum(t == task for task, _ in ends) for t in tasks.index} and (tasks.lists < tasks.chains).any()

def test_ablations_are_judged_beside_the_paper(reported):
    grid = pd.read_csv(reported/'reasoning_grid.csv')
    assert list(grid.system) == ['reasoned-plain', 'reasoned-plain.think', 'reasoned.no_think', 'reasoned'] and grid.value.notna().all()
    assert list(grid.paper.dropna()) == [.506, .5438]
    text = said(reported/'07_reasoning.ipynb')
    assert "Ours shows the opposite of the paper's effect." in text and '0.5060 to 0.5438' in text
    assert 'The graph has no established effect on F1 here' in text and 'The three sections: open.' in text and 'F1 grows with the data' in text
    assert list(pd.read_csv(reported/'reasoning_scaling.csv').samples_read) == [70, 140]

# -- runs that lack something

def test_reports_of_a_run_without_chains_or_stage_0(home, tmp_path):
    shutil.copytree(home/'runs', tmp_path/'runs')
    run = Run('r', tmp_path)
    for folder in (run.checkpoints, run.answers):
        for f in folder.iterdir():
            if f.name.startswith('re') or '-' in f.name: shutil.rmtree(f)
    (run.checkpoints/'base'/'metrics.jsonl').unlink(); shutil.rmtree(run.checkpoints/'base'/'examples')
    (run.checkpoints/'base'/'manifest.json').write_text(json.dumps(dict(key='b', params=dict(model='some/model'), counts=dict(checkpoint=str(tmp_path/'my-model'), parameters=5))))
    gone = pl.any_horizontal(pl.col('^(system|first|second)$').str.contains('^re|-'))
    for name in ('scores', 'comparisons'): pl.read_parquet(f := run.scores/f'models_{name}.parquet').filter(~gone).write_parquet(f)
    out = execute(tmp_path, tmp_path/'out')
    text = [said(out/f'{n}.ipynb') for n in NAMES]
    assert 'the checkpoint my-model' in text[0] and str(tmp_path) not in text[0] and 'reasoned, reinforced are missing' in text[0] and 'there was no stage 0' in text[0]
    assert 'open: not measured in this run, or not to be told' in text[1] and 'No model that thinks has answered' in text[1]
    assert 'No model of stage 2 stands in this run' in text[2] and '**Open.** One size of stage 1' in text[2]

def test_credentialed_data_show_no_text_and_no_small_count(home, tmp_path):
    shutil.copytree(home/'runs', tmp_path/'runs')
    run = Run('r', tmp_path)
    manifest = json.loads((run.trajectories/'manifest.json').read_text()); manifest['counts'] |= dict(access='credentialed', source='unknown')
    (run.trajectories/'manifest.json').write_text(json.dumps(manifest))
    out = execute(tmp_path, tmp_path/'out', NAMES[:2])
    assert not list(out.glob('*.html'))
    counting, seen, hidden = re.compile('^(samples|patients|positives|negatives|examples|cut|dropped_events|chains|records_cut|answered|empty|unclosed)$'), 0, 0
    for path in out.glob('*.csv'):
        d = pl.read_csv(path, infer_schema_length=None)
        for c in d.columns:
            if not counting.match(c): continue
            assert not d.filter(pl.col(c).cast(pl.Int64).is_between(1, SMALLEST - 1)).height, f'{path.name}: {c}'
            seen += d[c].count(); hidden += d[c].null_count()
    assert seen > 20 and hidden > 20
    for name in NAMES[:2]:
        text = said(out/f'{name}.ipynb')
        assert 'access: credentialed' in text and 'sample_id' not in text and not re.search(r'1\d{7}-\w+-\d+', text) and '<h4>' not in text
    assert 'no example is shown' in said(out/'05_training.ipynb')

# -- what the reports share

def test_verdicts():
    d = lambda v, low, high: dict(value=v, low=low, high=high)
    assert better(d(.1, .01, .2)) == 'yes' and better(d(.1, 0., .2)).startswith('no, not established') and better(d(-.1, -.2, -.01)) == 'no, the opposite shows'
    assert no_worse(d(.1, .01, .2)) == 'yes, and better' and no_worse(d(.1, -.05, .2)).endswith('a loss of 0.050') and no_worse(d(-.1, -.3, .1)).startswith('open') and no_worse(d(-.1, -.2, -.01)) == 'no, it is worse'
    assert reaches(d(.97, .96, .98), .95) == 'yes' and reaches(d(.94, .9, .96), .95) == 'no, though the interval reaches it' and reaches(d(.5, .4, .6), .95) == 'no'
    for f in (better, no_worse, lambda x: reaches(x, .95)): assert f(None).startswith('open')
    assert better(d(.1, None, None)).startswith('open') and no_worse(d(.1, float('nan'), float('nan'))).startswith('open')

def test_differences_keep_their_sign_whichever_way_they_were_made():
    paired = pd.DataFrame([dict(first='a', second='b', task='overall', metric='f1', difference=.2, low=.1, high=.4, p=.01, samples=9, patients=3, tasks=2)])
    r = Results(pd.DataFrame(dict(system=['a', 'b'], metric='f1', task='overall', value=[.3, None], low=.1, high=.4, samples=9, positives=None)), paired)
    assert r.difference('a', 'b', 'f1')['low'] == .1 and (r.difference('b', 'a', 'f1')['low'], r.difference('b', 'a', 'f1')['high']) == (-.4, -.1)
    assert r.difference('a', 'c', 'f1') is None and r.score('b', 'f1') is None and r.score('a', 'f1')['value'] == .3

def test_a_mean_over_one_patient_has_no_interval():
    assert mean_over_patients([1, 0], [5, 5], 1, 100) == dict(value=.5, low=None, high=None, samples=2, patients=1)
    m = mean_over_patients([1]*50 + [0]*50, range(100), 1, 500)
    assert m['low'] == pytest.approx(.4, abs=.04) and m['high'] == pytest.approx(.6, abs=.04)

def test_hostile_answers_are_judged():
    for text in ('', '</think>', '<think>'*5, '\ud800', '<think>\n## Extraction\n' + '**A [b]**: c\n'*1000, 'x'*10**6):
        j = judge(text, ['a'], read_record('', 'compact'))
        assert j['fault'] and not j['sound'] and j['reward'] <= 0

def test_order_of_training(): assert sorted(['reinforced.no_think', 'reasoned-plain.think', 'adapted', 'base', 'adapted-0.1', 'reasoned'], key=training_order) == ['base', 'adapted-0.1', 'adapted', 'reasoned-plain.think', 'reasoned', 'reinforced.no_think']
