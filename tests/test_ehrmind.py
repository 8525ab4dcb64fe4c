"""EHRMind: pass@k by hand, rewards no text can cheat, trainings that go on after a stop, scales that hold."""
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_r1.config import Run
from ehr_r1.data.samples import SYSTEM
from ehr_r1.ehrmind import course_examples as examples_module
from ehr_r1.ehrmind.calculators import CALCULATORS, draw_questions, gold_object, right_sum
from ehr_r1.ehrmind.course_examples import course_examples, course_rewards, read_rationale, teacher_rationales
from ehr_r1.ehrmind.courses import course_of
from ehr_r1.ehrmind.cross import build_cross
from ehr_r1.ehrmind.passing import ATTEMPTS, entropy, pass_at, pass_table, r_squared, reliable, verdict
from ehr_r1.ehrmind.recipe import Course, answer_in_form, in_form, train_questions, warmup_questions
from ehr_r1.ehrmind.stages import build_rewarded, build_warmed, recipe_of, trained
from ehr_r1.inference.teachers import Reply, Teacher
from ehr_r1.profiles import profile
from ehr_r1.stages import build, read_manifest
from ehr_r1.training.examples import Writer
from ehr_r1.training.metrics import read_metrics
from ehr_r1.training.models import new_model, train_tokenizer
from ehr_r1.training.rewards import ehrmind_answer
from ehr_r1.training.settings import CONFIGS
from ehr_r1.training.trainer import train
from ehr_r1.transfer.question_sets import QUESTIONS, Benchmark

# a benchmark of our own: which of four colours stands in a note

COLOURS = ('red', 'green', 'blue', 'white')

def colours(folder, p):
    "Its questions: 48 to train on, 24 held out, two to a note."
    rng = random.Random(1)
    rows = []
    for i in range(72):
        colour = rng.choice(COLOURS)
        room = rng.randint(100, 999)
        split = 'train' if i < 48 else 'held_out'
        note = [f'Room {room} is {colour}.']
        rows.append((f'{i}', f'note {i//2}', 'colour', split, 'decision', note, 'Which colour?', [colour]))
    return pl.DataFrame(rows, QUESTIONS, orient='row'), {}

def all_colours():
    "The questions alone."
    questions, _ = colours(None, None)
    return questions

def no_documents(folder):
    return {}

def right_colour(gold, found):
    return found['answer'] == gold[0]

def colour_target(question):
    return dict(answer=question['gold'][0])

def reasons(rows):
    "A rationale for each question."
    return {sample_id: f'It is {gold[0]}.' for sample_id, gold in rows.select('sample_id', 'gold').rows()}

def colour_rationales(run, p, folder, rows):
    return reasons(rows)

BENCH = Benchmark('colours', 'Colours', colours, None, None, no_documents, True, ('answer',), right_colour)
COURSE = Course(BENCH, colour_target, colour_rationales, share=.5)
SMALL = profile(
    'smoke', context=160, answer_tokens=48, prompts=2, completions=4, reason_batch=8, reason_steps=6,
    reinforce_steps=4, reason_rate=3e-3, reinforce_rate=1e-3)

def write_job(out, examples, **job):
    "A folder that can be trained."
    (out/'examples').mkdir(parents=True)
    examples.write_parquet(out/'examples'/'examples-00000.parquet')
    (out/'job.json').write_text(json.dumps(job | dict(profile=asdict(SMALL))))

def all_texts(rows):
    "Every question with every answer."
    texts = []
    for row in rows.iter_rows(named=True):
        asked = in_form(row['question'], ('answer',))
        for colour in COLOURS:
            said = answer_in_form(f'It is {colour}.', dict(answer=colour))
            texts.append(f'{row["context"][0]}\n{asked}{said}{SYSTEM}')
    return texts

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A run with a base model that has learned the form of an answer by heart."
    run = Run('r', tmp_path_factory.mktemp('run'))
    rows = all_colours()

    def make(out):
        tokenizer = train_tokenizer(all_texts(rows), 512)
        tokenizer.save_pretrained(out/'start')
        new_model('tiny', tokenizer, 1, 256).save_pretrained(out/'start')
        examples, _ = course_examples(rows, COURSE, Writer(tokenizer, 160, 48), reasons(rows))
        settings = dict(rate=1e-2, batch=16)
        write_job(out, examples, stage='warmup', start=str(out/'start'), steps=70, settings=settings)
        train(out)
        return dict(parameters=1)

    build(run.checkpoints/'base', make, {}, {}, 'ehrmind.stages')
    return run

# --- pass@k

@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer(right, k):
    n, correct = len(right), sum(right)
    if k > n:
        with pytest.raises(ValueError, match='pass@'):
            pass_at(n, correct, k)
        return
    chosen = [any(choice) for choice in combinations(right, k)]
    assert pass_at(n, correct, k) == pytest.approx(sum(chosen)/len(chosen), abs=1e-12)

def test_pass_at_k_by_hand():
    assert pass_at(12, 3, 1) == .25 and pass_at(12, 1, 12) == 1 and pass_at(12, 0, 12) == 0
    assert pass_at(4, 2, 2) == pytest.approx(5/6) and pass_at(5, 1, 3) == pytest.approx(3/5)

@pytest.mark.parametrize('m, need', [(7, 3), (21, 2), (3, 6), (2, 8), (5, 4), (12, 3), (13, 2)]) # k//m + 2 of 12
def test_reliable_needs_so_many_right_answers(m, need):
    enough = ['a']*need + ['b']*(12 - need)
    agree = entropy(enough) < .8*math.log(m)
    assert reliable(enough, need, m) is agree
    one_less = ['a']*(need - 1) + ['b']*(13 - need)
    assert not reliable(one_less, need - 1, m)

def test_reliable_needs_answers_that_agree():
    # .8 ln 7 = 1.557: answers over five classes have 1.517, over six 1.699
    five = ['a']*4 + ['b']*3 + ['c']*3 + ['d', 'e']
    six = ['a']*4 + ['b']*2 + ['c']*2 + ['d']*2 + ['e', 'f']
    by_hand = -(4/12*math.log(4/12) + 6/12*math.log(3/12) + 2/12*math.log(1/12))
    assert entropy(five) == pytest.approx(by_hand)
    assert entropy(five) < .8*math.log(7) < entropy(six)
    assert reliable(five, 4, 7) and not reliable(six, 4, 7)
    # .8 ln 2 = .555: 9 of 12 have .562, 10 of 12 .451
    assert not reliable(['yes']*9 + ['no']*3, 9, 2) and reliable(['yes']*10 + ['no']*2, 10, 2)
    # malformed answers count as an answer of their own
    assert not reliable(['yes']*8 + ['no']*2 + [None]*2, 8, 2)

def test_a_space_of_one_answer_is_refused():
    with pytest.raises(ValueError, match='m=1'):
        reliable(['a']*12, 12, 1)

def test_pass_table_by_hand():
    said = dict(x=['1']*9 + ['2']*3, y=['1'] + ['2', '3', '4', None]*2 + ['5']*3)
    rows = []
    for sample_id, answers in said.items():
        for i, answer in enumerate(answers):
            rows.append(('m', 0., 'before', 'train', sample_id, 'stage', i, answer, answer == '1'))
    t = pass_table(pl.DataFrame(rows, ATTEMPTS, orient='row'), dict(stage=5)).row(0, named=True)
    assert (t['m'], t['items'], t['k'], t['pass_12'], t['reliable']) == (5, 2, 12, 1., .5)
    assert t['pass_1'] == pytest.approx((9/12 + 1/12)/2) and t['malformed'] == pytest.approx(2/24)
    assert t['pass_2'] == pytest.approx((1 - 3/66 + 1 - 55/66)/2) # C(3,2) = 3, C(11,2) = 55, C(12,2) = 66
    assert t['verdict'] == 'misapplied'

VERDICTS = [(.9, .9, 'known'), (.4, .6, 'misapplied'), (.3, .3, 'between'), (.05, .1, 'missing')]

@pytest.mark.parametrize('single, often, expected', VERDICTS)
def test_verdicts(single, often, expected):
    assert verdict(single, often) == expected

def test_r_squared_agrees_with_scikit_learn():
    from sklearn.linear_model import LinearRegression
    rng = random.Random(0)
    x = [rng.random() for _ in range(20)]
    y = [2*value + rng.random() for value in x]
    column = [[value] for value in x]
    fit = LinearRegression().fit(column, y)
    assert r_squared(x, y) == pytest.approx(fit.score(column, y))

# --- calculators

def test_calculators_have_right_answers_in_their_space():
    rows, worked, read = draw_questions(3, 'train', 150)
    for name, c in CALCULATORS.items():
        some = rows.filter(pl.col('task') == name)
        answers = some.group_by('question').agg(n=pl.col('gold').list.first().n_unique())['n'] # to one question
        assert 1 < answers.max() <= c.m
        known = 0
        for question in some.iter_rows(named=True):
            sample_id = question['sample_id']
            known += read[sample_id] == (worked[sample_id], gold_object(question)['answer'])
        share = known/len(some)
        both_ways_may_agree = name in ('threshold', 'criteria')
        assert abs(share - c.known) < .15 or both_ways_may_agree, (name, share)
    text = pl.col('context').list.first() + pl.col('question')
    notes = rows.select(text).to_series()
    held_out, _, _ = draw_questions(3, 'held_out', 150)
    held = held_out.select(text).to_series()
    assert notes.is_in(held.implode()).mean() < .05

def test_worked_steps_lead_to_the_right_answer():
    rows, worked, _ = draw_questions(5, 'train', 60)
    for q in rows.iter_rows(named=True):
        last = worked[q['sample_id']].split()[-1]
        assert last == q['gold'][0] or (q['task'], last) in (('threshold', 'above'), ('threshold', 'below')), q
        if q['task'] == 'gap':
            lines = q['context'][0].splitlines()
            cations, = [int(line.split()[-1]) for line in lines if 'Cations' in line]
            anions, = [int(line.split()[-1]) for line in lines if 'Anions' in line]
            assert cations - anions == int(q['gold'][0])
        if q['task'] == 'criteria':
            asked = [line.removeprefix('- ') for line in q['question'].splitlines() if line.startswith('- ')]
            assert sum(f'{a}: yes' in q['context'][0] for a in asked) == int(q['gold'][0])

def test_draws_depend_on_the_item_alone():
    few, many = (draw_questions(3, 'train', n)[0] for n in (2, 5))
    assert many.head(len(few)).equals(few)

# --- rewards

TAGS = [
    '<think>', '</think>', '<answer>', '</answer>', '{"answer": ', '"red"', '"\\ud800"', '}', '1e999', 'NaN',
    '\x00', 'It is red.', '{', '[', '9'*400, ' ']

@given(st.lists(st.sampled_from(TAGS), max_size=14).map(''.join), st.sampled_from(COLOURS))
def test_no_text_earns_what_is_not_foreseen(text, gold):
    reward, = course_rewards(BENCH)
    earned, = reward(completions=[text], label=[[gold]], sample_id=['x'])
    found = ehrmind_answer(text, ('answer',))
    if found is None:
        assert earned == -2.
    else:
        assert earned == (1.1 if found['answer'] == gold else 0.)

SCALARS = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)

@given(st.sampled_from(['0', '7', '39', 'yes', 'no']), SCALARS)
def test_the_pilots_judge_has_an_opinion_on_everything(gold, value):
    assert right_sum([gold], dict(answer=value)) in (True, False)
    if isinstance(value, bool):
        assert not right_sum([gold], dict(answer=value))
    if isinstance(value, float) and not value.is_integer():
        assert not right_sum([gold], dict(answer=value))

def test_all_answers_at_once_earn_nothing():
    reward, = course_rewards(BENCH)
    all_answers = ''.join(f'<answer>{{"answer": "{colour}"}}</answer>' for colour in COLOURS)
    cheats = [
        f'<think>t</think>{all_answers}',
        answer_in_form('t', dict(answer=' '.join(COLOURS))),
        '<think>t</think><answer>{"answer": ["red", "green", "blue", "white"]}</answer>',
        '<think>t</think><answer>{"answer": "red", "answer": "green"}</answer>']
    for gold in COLOURS:
        earned = reward(completions=cheats, label=[[gold]]*4)
        assert max(earned) <= 0

@pytest.mark.skipif(find_spec('ehr_r1.transfer.trials') is None, reason='no module of trial matching yet')
def test_trecs_scale_cannot_be_swapped():
    "TREC: 0 not relevant, 1 excluded, 2 eligible; EHRMind's reward had 0 and 1 the other way round."
    course = course_of('trials')
    reward, = course_rewards(course.benchmark)
    scale = {0: 'Irrelevant', 1: 'Excluded', 2: 'Eligible'}
    for number, word in scale.items():
        assert course.target(dict(gold=[word])) == dict(prediction=word, idx=number)
        for i in scale:
            for w in scale.values():
                said = answer_in_form('t', dict(prediction=w, idx=i))
                earned, = reward(completions=[said], label=[[word]])
                assert earned == (1.1 if (i, w) == (number, word) else 0.), (word, i, w)

@pytest.mark.parametrize('name', ['medcalc', 'trials', 'ehrshot'])
def test_courses_have_the_published_values(name):
    if find_spec(f'ehr_r1.transfer.{name}') is None:
        pytest.skip(f'no module {name} yet')
    course = course_of(name)
    r = recipe_of(profile('paper'), course)
    published = dict(
        medcalc=(2_048, 1_500, 16, 12, .2),
        trials=(1_500, 2_048, 32, 12, 1.),
        ehrshot=(4_000, 800, 32, 8, 0.))
    lengths = (r.profile.context, r.profile.answer_tokens)
    assert (*lengths, r.warmup['batch'], r.grpo['samples'], r.share) == published[name]
    assert r.warmup['rate'] == 2e-5
    assert r.grpo['rate'] == 1e-6
    assert r.grpo['prompts'] == 32
    assert course.epochs == 2
    assert (course.most, course.balanced) == ((3_000, True) if name == 'trials' else (0, False))

def test_settings_of_the_two_stages_are_the_published_ones():
    p = profile('paper', answer_tokens=1_500)
    w, g = (CONFIGS[s](p, Path('x'), 100) for s in ('warmup', 'ehrmind'))
    assert w.learning_rate == 2e-5
    assert w.per_device_train_batch_size*w.gradient_accumulation_steps == 32
    assert w.completion_only_loss
    assert (g.learning_rate, g.num_generations, g.beta) == (1e-6, 12, .001)
    assert (g.temperature, g.top_p, g.max_completion_length) == (.6, .95, 1_500)
    assert g.per_device_train_batch_size*g.gradient_accumulation_steps == 32*12

# --- examples

def test_shares_of_the_warm_up_are_nested_and_exact():
    rows = train_questions(all_colours(), 42)
    assert rows['split'].unique().to_list() == ['train'] and len(rows) == 48
    parts = [set(warmup_questions(rows, s)['sample_id']) for s in (0., .1, .15, .2, 1.)]
    assert [len(x) for x in parts] == [0, 5, 7, 10, 48] and all(a <= b for a, b in zip(parts, parts[1:]))
    assert train_questions(rows.sample(fraction=1., shuffle=True, seed=3), 42).equals(rows)
    even = warmup_questions(rows, 1., 20, True)
    fewest = rows['gold'].list.first().value_counts()['count'].min()
    assert even['gold'].list.first().value_counts()['count'].to_list() == [min(5, fewest)]*4
    examples = rows.with_columns(split=pl.lit('example'))
    assert len(train_questions(examples, 42)) == 48 # the worked examples, where there is no training file

def test_what_cannot_be_learned_is_left_out_and_counted(base):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(base.checkpoints/'base'/'model')
    rows = all_colours().head(4)
    writer = Writer(tokenizer, 160, 48)
    why = {s: 'A first sentence. '*20 + 'It is so.' for s in rows['sample_id'][:3]}
    made, counts = course_examples(rows, COURSE, writer, why)
    assert counts == dict(rationales_cut=3, left_out={'no rationale': 1})
    assert (made['answer_tokens'] <= 48).all()
    for answer, gold in zip(made['answer'], made['label']):
        assert 'It is so.' in answer
        assert ehrmind_answer(answer, ('answer',)) == dict(answer=gold[0])
    _, counts = course_examples(rows, COURSE, Writer(tokenizer, 12, 48), why)
    assert counts['left_out'] == {'question is longer than the context': 4}

    def black(question):
        return dict(answer='black')

    _, counts = course_examples(rows, replace(COURSE, target=black), writer, why)
    assert counts['left_out'] == {'its own answer is not judged right': 4}
    silent, counts = course_examples(rows, COURSE, writer, {})
    assert len(silent) == 4
    assert counts['rationales_cut'] == 0
    assert all('<think>\n\n</think>' in answer for answer in silent['answer'])

def test_least_confident_rationales_are_dropped(tmp_path, monkeypatch):
    rows = train_questions(all_colours(), 42).head(10)
    class Sure(Teacher):
        name = model = 'sure'
        def ask(self, requests):
            for i, r in enumerate(reversed(list(requests))):
                assert 'The right answer is' in r.messages[1]['content']
                unreadable = {3: 'no confidence at all', 5: '<answer>red</answer>\nConfidence: 99'}
                said = unreadable.get(i, f'Seen in the note.\nConfidence: {i*10}')
                yield r, Reply(said, 1, 1, 'stop', 'sure')
    monkeypatch.setattr(examples_module, 'open_teacher', lambda kind, file: Sure())
    kept = teacher_rationales(Run('r', tmp_path), profile('smoke', teacher='server'), COURSE, rows)
    asked = rows['sample_id'].to_list()[::-1]
    # two cannot be read; of the other eight a fifth, two, is dropped
    assert set(kept) == {asked[i] for i in (2, 4, 6, 7, 8, 9)}
    assert teacher_rationales(Run('r', tmp_path), profile('smoke'), COURSE, rows) == {} # no model, no rationales

NO_RATIONALES = [
    '', 'Confidence: 50', 'Because.', 'Because.\nConfidence: 101', 'Because <think>.\nConfidence: 50',
    'Confidence: 50\nBecause.']

@pytest.mark.parametrize('text', NO_RATIONALES)
def test_rationales_without_their_parts_are_refused(text):
    assert read_rationale(text) is None

# --- trainings

def stopped(out, step, rewards, monkeypatch):
    "Train up to a step."
    import transformers.trainer
    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, Stop]
        patch.setattr(transformers.trainer, 'DEFAULT_CALLBACKS', callbacks)
        with pytest.raises(KeyboardInterrupt):
            train(out, rewards)

def lasting_metrics(folder):
    "What a training logged, but for the clock."
    lines = read_metrics(folder)
    return [{key: value for key, value in line.items() if key not in ('seconds', 'step_time')} for line in lines]

def test_interrupted_grpo_comes_out_the_same(base, tmp_path, monkeypatch):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    start = base.checkpoints/'base'/'model'
    writer = Writer(AutoTokenizer.from_pretrained(start), 160, 48)
    few = all_colours().head(7) # fewer than are asked
    rows, _ = course_examples(few, COURSE, writer)
    folders = [tmp_path/name for name in ('whole', 'stopped')]
    settings = dict(rate=1e-3, prompts=2, samples=4)
    for out in folders:
        write_job(out, rows, stage='ehrmind', start=str(start), steps=11, settings=settings)
    rewards = course_rewards(BENCH)
    train(folders[0], rewards)
    stopped(folders[1], 7, rewards, monkeypatch)
    assert {c.name for c in (folders[1]/'trainer').glob('checkpoint-*')} == {'checkpoint-6'}
    train(folders[1], rewards)
    one, two = map(lasting_metrics, folders)
    assert one == two
    assert len(one) == 11
    assert all(-2 <= line['rewards/ehrmind/mean'] < 1.1001 for line in one)
    assert one[-1]['kl'] > 0 # held to the model it started from
    assert sum(line['reward_std'] > 0 and line['grad_norm'] > 0 for line in one) > 1
    models = (folders[0]/'model', folders[1]/'model', start)
    a, b, old = (load_file(model/'model.safetensors') for model in models)
    assert all((a[name] == b[name]).all() for name in a)
    assert any((a[name] != old[name]).any() for name in old)

def test_grpo_without_a_judge_is_refused(tmp_path):
    job = dict(stage='ehrmind', start='x', steps=1, profile=asdict(SMALL))
    (tmp_path/'job.json').write_text(json.dumps(job))
    with pytest.raises(ValueError, match='rewards of its benchmark'):
        train(tmp_path)

def test_recipe_runs_once_and_starts_where_it_should(base):
    assert build_warmed(base, SMALL, COURSE, None)
    assert not build_warmed(base, SMALL, COURSE, None)
    assert build_rewarded(base, SMALL, COURSE, None)
    assert not build_rewarded(base, SMALL, COURSE, None)
    assert build_rewarded(base, SMALL, COURSE, None, 0.)
    warm, rewarded, alone = (read_manifest(trained(base, n)) for n in ('colours-warmup', 'colours', 'colours-0'))
    assert warm['counts']['questions'] == warm['counts']['rationales'] == 24 and rewarded['counts']['questions'] == 48
    assert rewarded['inputs'] == {'colours-warmup': warm['content']}
    assert alone['inputs'] == {'base': read_manifest(base.checkpoints/'base')['content']}
    assert warm['counts']['steps'] == 6 # two epochs of 24 by 8
    assert rewarded['counts']['steps'] == 4 # one of 48 by 2, but at most 4
    with pytest.raises(ValueError, match='share 0'):
        build_warmed(base, SMALL, COURSE, None, 0.)
    with pytest.raises(FileNotFoundError): # its warm-up does not stand
        build_rewarded(base, SMALL, COURSE, None, .1)
    # each model on each benchmark
    def never_right(gold, found):
        return False

    other = replace(COURSE, benchmark=replace(BENCH, name='others', right=never_right))
    courses = [(COURSE, None), (other, None)]
    assert build_cross(base, SMALL, courses)
    assert not build_cross(base, SMALL, courses)
    table = pl.read_parquet(base.folder/'transfer'/'cross'/'cross.parquet')
    expected = []
    for tested in ('colours', 'others'):
        for model in ('base', 'colours'):
            expected += [(model, tested, 'accuracy'), (model, tested, 'malformed')]
    assert table.select('trained', 'tested', 'metric').rows() == expected
    assert table.filter(tested='others', metric='accuracy')['value'].to_list() == [0, 0]
    assert (table['samples'] == SMALL.lm_per_task).all()

def test_launcher_knows_its_benchmarks_only(tmp_path):
    (tmp_path/'job.json').write_text(json.dumps(dict(benchmark='os')))
    command = [sys.executable, '-m', 'ehr_r1.ehrmind.stages', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "no course 'os'" in done.stderr
