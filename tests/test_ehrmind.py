"""EHRMind: pass@k by hand, rewards no text can cheat, trainings that go on after a stop, scales that hold."""
import json
import math
import random
import re
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
from ehr_r1.ehrmind.cross import balanced, build_cross, parts_of
from ehr_r1.ehrmind.known import build_known
from ehr_r1.ehrmind.passing import ATTEMPTS, entropy, pass_at, pass_table, r_squared, reliable, verdict
from ehr_r1.ehrmind.recipe import Course, answer_in_form, in_form, train_questions, warmup_questions
from ehr_r1.ehrmind.stages import (
    build_beginning,
    build_course,
    build_on_one,
    build_rewarded,
    build_warmed,
    on_one,
    recipe_of,
    start_of,
    trained,
)
from ehr_r1.inference.checkpoints import ModelError
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
        rows.append(dict(
            sample_id=f'{i}',
            group=f'note {i//2}',
            task='colour',
            split='train' if i < 48 else 'held_out',
            kind='decision',
            context=[f'Room {room} is {colour}.'],
            question='Which colour?',
            gold=[colour]))
    return pl.DataFrame(rows, QUESTIONS), {}

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
    golds = rows.select('sample_id', 'gold').rows()
    return {sample_id: f'It is {colour}.' for sample_id, (colour,) in golds}

def colour_rationales(run, p, folder, rows):
    return reasons(rows)

BENCH = Benchmark('colours', 'Colours', colours, None, None, no_documents, True, ('answer',), right_colour)
COURSE = Course(BENCH, colour_target, colour_rationales, share=.5)
SMALL = profile(
    'smoke',
    context=160,
    answer_tokens=48,
    prompts=2,
    completions=4,
    reason_batch=8,
    reason_steps=6,
    reinforce_steps=4,
    reason_rate=3e-3,
    reinforce_rate=1e-3)

def write_job(out, examples, **job):
    "A folder that can be trained."
    (out/'examples').mkdir(parents=True)
    examples.write_parquet(out/'examples'/'examples-00000.parquet')
    job['profile'] = asdict(SMALL)
    (out/'job.json').write_text(json.dumps(job))

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
        start = out/'start'
        tokenizer = train_tokenizer(all_texts(rows), 512)
        tokenizer.save_pretrained(start)
        new_model('tiny', tokenizer, 1, 256).save_pretrained(start)
        writer = Writer(tokenizer, 160, 48)
        examples, _ = course_examples(rows, COURSE, writer, reasons(rows))
        settings = dict(rate=1e-2, batch=16)
        write_job(out, examples, stage='warmup', start=str(start), steps=70, settings=settings)
        train(out)
        return dict(parameters=1)

    build(run.checkpoints/'base', make, {}, {}, 'ehrmind.stages')
    return run

# --- pass@k

RIGHT = st.lists(st.booleans(), min_size=1, max_size=8)

@given(RIGHT, st.integers(1, 8))
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer(right, k):
    n, correct = len(right), sum(right)
    if k > n:
        with pytest.raises(ValueError, match='pass@'):
            pass_at(n, correct, k)
        return
    chosen = [any(choice) for choice in combinations(right, k)]
    share = sum(chosen)/len(chosen)
    assert pass_at(n, correct, k) == pytest.approx(share, abs=1e-12)

@pytest.mark.parametrize('n, correct, k, expected', [
    (12, 3, 1, 1/4),
    (12, 1, 12, 1),
    (12, 0, 12, 0),
    (4, 2, 2, 5/6),
    (5, 1, 3, 3/5),
])
def test_pass_at_k_by_hand(n, correct, k, expected):
    assert pass_at(n, correct, k) == pytest.approx(expected, abs=1e-15)

@pytest.mark.parametrize('m, need', [ # 12//m + 2
    (2, 8),
    (3, 6),
    (5, 4),
    (7, 3),
    (12, 3),
    (13, 2),
    (21, 2),
])
def test_reliable_needs_so_many_right_answers(m, need):
    enough = ['a']*need + ['b']*(12 - need)
    agree = entropy(enough) < .8*math.log(m)
    assert reliable(enough, need, m) is agree
    fewer = need - 1
    not_enough = ['a']*fewer + ['b']*(12 - fewer)
    assert not reliable(not_enough, fewer, m)

# .8 ln 7 = 1.557: answers over five classes have 1.517, over six 1.699
FIVE = list('aaaabbbcccde')
SIX = list('aaaabbccddef')

def test_entropy_by_hand():
    a, b, d = 4/12, 3/12, 1/12
    by_hand = -(a*math.log(a) + 2*b*math.log(b) + 2*d*math.log(d))
    assert entropy(FIVE) == pytest.approx(by_hand)
    assert entropy(FIVE) < .8*math.log(7) < entropy(SIX)

def test_reliable_needs_answers_that_agree():
    assert reliable(FIVE, 4, 7)
    assert not reliable(SIX, 4, 7)

def test_reliable_needs_ten_of_twelve_where_there_are_two_answers():
    # .8 ln 2 = .555: 9 of 12 have .562, 10 of 12 .451
    nine = ['yes']*9 + ['no']*3
    ten = ['yes']*10 + ['no']*2
    assert not reliable(nine, 9, 2)
    assert reliable(ten, 10, 2)

def test_malformed_answers_count_as_an_answer_of_their_own():
    answers = ['yes']*8 + ['no']*2 + [None]*2
    assert not reliable(answers, 8, 2)

def test_a_space_of_one_answer_is_refused():
    with pytest.raises(ValueError, match='m=1'):
        reliable(['a']*12, 12, 1)

def attempts_at(sample_id, answers):
    "Attempts at a question whose right answer is 1."
    about = ('m', 0., 'before', 'train', sample_id, 'stage')
    return [(*about, i, answer, answer == '1') for i, answer in enumerate(answers)]

def test_pass_table_by_hand():
    nine_right = ['1']*9 + ['2']*3
    one_right = ['1'] + ['2', '3', '4', None]*2 + ['5']*3
    rows = attempts_at('x', nine_right) + attempts_at('y', one_right)
    attempts = pl.DataFrame(rows, ATTEMPTS, orient='row')
    t = pass_table(attempts, dict(stage=5)).row(0, named=True)
    assert t['m'] == 5
    assert t['items'] == 2
    assert t['k'] == 12
    assert t['pass_1'] == pytest.approx((9/12 + 1/12)/2)
    both_wrong = (3/66 + 55/66)/2 # C(3,2) = 3, C(11,2) = 55, C(12,2) = 66
    assert t['pass_2'] == pytest.approx(1 - both_wrong)
    assert t['pass_12'] == 1.
    assert t['reliable'] == .5
    assert t['malformed'] == pytest.approx(2/24)
    assert t['verdict'] == 'misapplied'

@pytest.mark.parametrize('single, often, expected', [
    (.9, .9, 'known'),
    (.4, .6, 'misapplied'),
    (.3, .3, 'between'),
    (.05, .1, 'missing'),
])
def test_verdicts(single, often, expected):
    assert verdict(single, often) == expected

def test_r_squared_agrees_with_scikit_learn():
    from sklearn.linear_model import LinearRegression
    rng = random.Random(0)
    x = [rng.random() for _ in range(20)]
    y = [2*value + rng.random() for value in x]
    column = [[value] for value in x]
    fit = LinearRegression().fit(column, y)
    by_scikit_learn = fit.score(column, y)
    assert r_squared(x, y) == pytest.approx(by_scikit_learn)

# --- calculators

@pytest.fixture(scope='module')
def drawn():
    "Training questions of every calculator, with their worked steps and what each reading leads to."
    return draw_questions(3, 'train', 150)

@pytest.mark.parametrize('name', CALCULATORS)
def test_calculators_have_answers_in_their_space(drawn, name):
    rows, _, _ = drawn
    gold = pl.col('gold').list.first()
    of_one_question = rows.filter(task=name).group_by('question').agg(answers=gold.n_unique())
    assert 1 < of_one_question['answers'].max() <= CALCULATORS[name].m

@pytest.mark.parametrize('name', CALCULATORS)
def test_calculators_are_known_as_often_as_they_say(drawn, name):
    rows, worked, read = drawn
    of_calculator = rows.filter(task=name)
    known = 0
    for question in of_calculator.iter_rows(named=True):
        sample_id = question['sample_id']
        right = gold_object(question)['answer']
        known += read[sample_id] == (worked[sample_id], right)
    share = known/len(of_calculator)
    both_ways_may_agree = name in ('threshold', 'criteria')
    assert both_ways_may_agree or abs(share - CALCULATORS[name].known) < .15

def test_hardly_a_training_question_is_held_out(drawn):
    rows, _, _ = drawn
    held_out, _, _ = draw_questions(3, 'held_out', 150)
    text = pl.col('context').list.first() + pl.col('question')
    trained = rows.select(text).to_series()
    tested = held_out.select(text).to_series()
    assert trained.is_in(tested.implode()).mean() < .05

@pytest.fixture(scope='module')
def worked_questions():
    "Task -> (note, question, right answer, last worked step) of its questions."
    rows, worked, _ = draw_questions(5, 'train', 60)
    by_task = {}
    for row in rows.iter_rows(named=True):
        (note,), (gold,) = row['context'], row['gold']
        *_, last_step = worked[row['sample_id']].split()
        by_task.setdefault(row['task'], []).append((note, row['question'], gold, last_step))
    return by_task

def test_worked_steps_lead_to_the_right_answer(worked_questions):
    assert worked_questions.keys() == CALCULATORS.keys()
    for task, questions in worked_questions.items():
        for question in questions:
            *_, gold, last_step = question
            a_comparison = task == 'threshold' and last_step in ('above', 'below')
            assert a_comparison or last_step == gold, question

def test_a_gap_is_cations_less_anions(worked_questions):
    for note, _, gold, _ in worked_questions['gap']:
        cations, = re.findall(r'Cations.* (\d+)$', note, re.M)
        anions, = re.findall(r'Anions.* (\d+)$', note, re.M)
        assert int(cations) - int(anions) == int(gold)

def test_criteria_are_those_that_the_note_says_are_met(worked_questions):
    for note, question, gold, _ in worked_questions['criteria']:
        asked = re.findall('^- (.*)$', question, re.M)
        met = [criterion for criterion in asked if f'{criterion}: yes' in note]
        assert len(met) == int(gold)

def test_draws_depend_on_the_item_alone():
    few, _, _ = draw_questions(3, 'train', 2)
    many, _, _ = draw_questions(3, 'train', 5)
    assert many.head(len(few)).equals(few)

# --- rewards

TAGS = ['<think>', '</think>', '<answer>', '</answer>']
PARTS = ['{"answer": ', '"red"', '"\\ud800"', '}', '{', '[', '1e999', 'NaN', '9'*400]
PIECES = st.sampled_from([*TAGS, *PARTS, 'It is red.', '\x00', ' '])
TEXTS = st.lists(PIECES, max_size=14).map(''.join)

@given(TEXTS, st.sampled_from(COLOURS))
def test_no_text_earns_what_is_not_foreseen(text, gold):
    reward, = course_rewards(BENCH)
    earned, = reward(completions=[text], label=[[gold]], sample_id=['x'])
    found = ehrmind_answer(text, ('answer',))
    if found is None:
        assert earned == -2.
    else:
        assert earned == (1.1 if found['answer'] == gold else 0.)

GOLDS = st.sampled_from(['0', '7', '39', 'yes', 'no'])
SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20))

@given(GOLDS, SCALARS)
def test_the_pilots_judge_has_an_opinion_on_everything(gold, value):
    verdict = right_sum([gold], dict(answer=value))
    assert verdict in (True, False)
    a_fraction = isinstance(value, float) and not value.is_integer()
    if isinstance(value, bool) or a_fraction:
        assert not verdict

def test_all_answers_at_once_earn_nothing():
    reward, = course_rewards(BENCH)
    def in_tags(answer):
        return f'<answer>{answer}</answer>'

    each_in_tags = ''.join(in_tags(json.dumps(dict(answer=colour))) for colour in COLOURS)
    cheats = [
        f'<think>t</think>{each_in_tags}',
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
    words = ['Irrelevant', 'Excluded', 'Eligible']
    answers = [dict(prediction=word, idx=number) for word in words for number in range(3)]
    for number, word in enumerate(words):
        right = dict(prediction=word, idx=number)
        assert course.target(dict(gold=[word])) == right
        for answer in answers:
            said = answer_in_form('t', answer)
            earned, = reward(completions=[said], label=[[word]])
            assert earned == (1.1 if answer == right else 0.), (word, answer)

@pytest.mark.parametrize('name, context, answer_tokens, batch, samples, share', [
    ('medcalc', 2_048, 1_500, 16, 12, .2),
    ('trials', 1_500, 2_048, 32, 12, 1.),
    ('ehrshot', 4_000, 800, 32, 8, 0.),
])
def test_courses_have_the_published_values(name, context, answer_tokens, batch, samples, share):
    if find_spec(f'ehr_r1.transfer.{name}') is None:
        pytest.skip(f'no module {name} yet')
    course = course_of(name)
    recipe = recipe_of(profile('paper'), course)
    assert recipe.profile.context == context
    assert recipe.profile.answer_tokens == answer_tokens
    assert recipe.warmup['batch'] == batch
    assert recipe.warmup['rate'] == 2e-5
    assert recipe.grpo['samples'] == samples
    assert recipe.grpo['rate'] == 1e-6
    assert recipe.grpo['prompts'] == 32
    assert recipe.share == share
    assert course.epochs == 2
    of_trials = name == 'trials'
    assert course.most == (3_000 if of_trials else 0)
    assert course.balanced is of_trials

PUBLISHED = profile('paper', answer_tokens=1_500)

def batch_of(settings):
    return settings.per_device_train_batch_size*settings.gradient_accumulation_steps

def test_settings_of_the_warm_up_are_the_published_ones():
    warmup = CONFIGS['warmup'](PUBLISHED, Path('x'), 100)
    assert warmup.learning_rate == 2e-5
    assert batch_of(warmup) == 32
    assert warmup.completion_only_loss

def test_settings_of_grpo_are_the_published_ones():
    grpo = CONFIGS['ehrmind'](PUBLISHED, Path('x'), 100)
    assert grpo.learning_rate == 1e-6
    assert grpo.num_generations == 12
    assert grpo.beta == .001
    assert grpo.temperature == .6
    assert grpo.top_p == .95
    assert grpo.max_completion_length == 1_500
    assert batch_of(grpo) == 32*12

# --- examples

@pytest.fixture(scope='module')
def to_learn():
    "The questions to train on."
    return train_questions(all_colours(), 42)

def sizes_of_classes(questions):
    colours = questions['gold'].list.first()
    return colours.value_counts()['count']

def test_training_questions_are_those_of_the_training_split(to_learn):
    assert len(to_learn) == 48
    assert set(to_learn['split']) == {'train'}

def test_training_questions_do_not_depend_on_the_order_of_rows(to_learn):
    shuffled = to_learn.sample(fraction=1., shuffle=True, seed=3)
    assert train_questions(shuffled, 42).equals(to_learn)

def test_worked_examples_are_learned_where_there_is_no_training_file(to_learn):
    examples = to_learn.with_columns(split=pl.lit('example'))
    assert len(train_questions(examples, 42)) == 48

def test_shares_of_the_warm_up_are_nested_and_exact(to_learn):
    sizes = {0.: 0, .1: 5, .15: 7, .2: 10, 1.: 48}
    smaller = set()
    for share, size in sizes.items():
        part = set(warmup_questions(to_learn, share)['sample_id'])
        assert len(part) == size
        assert smaller <= part
        smaller = part

def test_a_balanced_warm_up_has_as_many_of_each_class(to_learn):
    even = warmup_questions(to_learn, 1., 20, True)
    rarest = sizes_of_classes(to_learn).min()
    assert sizes_of_classes(even).to_list() == [min(5, rarest)]*4

@pytest.fixture(scope='module')
def tokenizer(base):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(base.checkpoints/'base'/'model')

@pytest.fixture(scope='module')
def writer(tokenizer):
    return Writer(tokenizer, 160, 48)

FOUR = all_colours().head(4)
LONG_REASON = 'A first sentence. '*20 + 'It is so.'
REASONS_OF_THREE = dict.fromkeys(FOUR['sample_id'][:3], LONG_REASON)

def test_long_rationales_are_cut_and_missing_ones_left_out(writer):
    made, counts = course_examples(FOUR, COURSE, writer, REASONS_OF_THREE)
    assert counts == dict(rationales_cut=3, left_out={'no rationale': 1})
    assert (made['answer_tokens'] <= 48).all()
    for answer, (colour,) in made.select('answer', 'label').iter_rows():
        assert 'It is so.' in answer
        assert ehrmind_answer(answer, ('answer',)) == dict(answer=colour)

def test_questions_that_do_not_fit_the_context_are_left_out(tokenizer):
    short = Writer(tokenizer, 12, 48)
    _, counts = course_examples(FOUR, COURSE, short, REASONS_OF_THREE)
    assert counts['left_out'] == {'question is longer than the context': 4}

def test_examples_with_a_wrong_answer_are_left_out(writer):
    def black(question):
        return dict(answer='black')

    wrong = replace(COURSE, target=black)
    _, counts = course_examples(FOUR, wrong, writer, REASONS_OF_THREE)
    assert counts['left_out'] == {'its own answer is not judged right': 4}

def test_without_rationales_nothing_is_thought(writer):
    silent, counts = course_examples(FOUR, COURSE, writer, {})
    assert len(silent) == 4
    assert counts['rationales_cut'] == 0
    assert all('<think>\n\n</think>' in answer for answer in silent['answer'])

class Sure(Teacher):
    "Is asked from the last question to the first, and ever surer; two of its answers cannot be read."
    name = model = 'sure'
    unreadable = {
        3: 'no confidence at all',
        5: '<answer>red</answer>\nConfidence: 99'}

    def ask(self, requests):
        for i, request in enumerate(reversed(list(requests))):
            _, question = request.messages
            assert 'The right answer is' in question['content']
            said = self.unreadable.get(i, f'Seen in the note.\nConfidence: {i*10}')
            yield request, Reply(said, 1, 1, 'stop', 'sure')

def test_least_confident_rationales_are_dropped(to_learn, tmp_path, monkeypatch):
    ten = to_learn.head(10)
    monkeypatch.setattr(examples_module, 'open_teacher', lambda kind, file: Sure())
    kept = teacher_rationales(Run('r', tmp_path), profile('smoke', teacher='server'), COURSE, ten)
    asked = ten['sample_id'].reverse()
    # two cannot be read; of the other eight a fifth, two, is dropped
    assert set(kept) == set(asked.gather([2, 4, 6, 7, 8, 9]))

def test_no_model_writes_no_rationales(to_learn, tmp_path):
    run = Run('r', tmp_path)
    assert teacher_rationales(run, profile('smoke'), COURSE, to_learn.head(10)) == {}

@pytest.mark.parametrize('text', [
    '',
    'Confidence: 50',
    'Because.',
    'Because.\nConfidence: 101',
    'Because <think>.\nConfidence: 50',
    'Confidence: 50\nBecause.',
])
def test_rationales_without_their_parts_are_refused(text):
    assert read_rationale(text) is None

# --- trainings

def train_up_to(out, step, rewards):
    "A training that is interrupted at a step."
    import transformers.trainer

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, Stop]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, 'DEFAULT_CALLBACKS', callbacks)
        with pytest.raises(KeyboardInterrupt):
            train(out, rewards)

def lasting_metrics(folder):
    "What a training logged, but for the clock."
    lines = read_metrics(folder)
    for line in lines:
        for key in ('seconds', 'step_time'):
            line.pop(key, None)
    return lines

@pytest.fixture(scope='module')
def whole_and_stopped(base, writer, tmp_path_factory):
    "Folders of two trainings with GRPO: one that ran to its end, and one that was stopped and went on."
    few = all_colours().head(7) # fewer than are asked
    rows, _ = course_examples(few, COURSE, writer)
    rewards = course_rewards(BENCH)
    job = dict(
        stage='ehrmind',
        start=str(base.checkpoints/'base'/'model'),
        steps=11,
        settings=dict(rate=1e-3, prompts=2, samples=4))
    folder = tmp_path_factory.mktemp('grpo')
    whole, stopped = folder/'whole', folder/'stopped'
    for out in (whole, stopped):
        write_job(out, rows, **job)
    train(whole, rewards)
    train_up_to(stopped, 7, rewards)
    checkpoints = [path.name for path in (stopped/'trainer').glob('checkpoint-*')]
    assert checkpoints == ['checkpoint-6']
    train(stopped, rewards)
    return whole, stopped

def weights_of(model):
    from safetensors.torch import load_file
    return load_file(model/'model.safetensors')

def test_interrupted_grpo_comes_out_the_same(whole_and_stopped):
    whole, stopped = whole_and_stopped
    assert lasting_metrics(stopped) == lasting_metrics(whole)
    expected, weights = weights_of(whole/'model'), weights_of(stopped/'model')
    for name, values in expected.items():
        assert (weights[name] == values).all()

def test_grpo_changes_weights_and_is_held_to_where_it_started(base, whole_and_stopped):
    whole, _ = whole_and_stopped
    lines = lasting_metrics(whole)
    assert len(lines) == 11
    assert all(-2 <= line['rewards/ehrmind/mean'] < 1.1001 for line in lines)
    learned = [line for line in lines if line['reward_std'] > 0 and line['grad_norm'] > 0]
    assert len(learned) > 1
    assert lines[-1]['kl'] > 0
    before = weights_of(base.checkpoints/'base'/'model')
    after = weights_of(whole/'model')
    assert any((after[name] != values).any() for name, values in before.items())

def test_grpo_without_a_judge_is_refused(tmp_path):
    job = dict(stage='ehrmind', start='x', steps=1, profile=asdict(SMALL))
    (tmp_path/'job.json').write_text(json.dumps(job))
    with pytest.raises(ValueError, match='rewards of its benchmark'):
        train(tmp_path)

@pytest.fixture(scope='module')
def recipe(base):
    "The run after a warm-up, the reinforcement of it and one without."
    assert build_warmed(base, SMALL, COURSE, None)
    assert build_rewarded(base, SMALL, COURSE, None)
    assert build_rewarded(base, SMALL, COURSE, None, 0.)
    return base

def manifest_of(run, name):
    return read_manifest(trained(run, name))

def test_recipe_runs_once(recipe):
    assert not build_warmed(recipe, SMALL, COURSE, None)
    assert not build_rewarded(recipe, SMALL, COURSE, None)

def test_recipe_counts_its_questions_and_steps(recipe):
    warmup = manifest_of(recipe, 'colours-warmup')['counts']
    rewarded = manifest_of(recipe, 'colours')['counts']
    assert warmup['questions'] == 24
    assert warmup['rationales'] == 24
    assert warmup['steps'] == 6 # two epochs of 24 by 8
    assert rewarded['questions'] == 48
    assert rewarded['steps'] == 4 # one of 48 by 2, but at most 4

def test_recipe_starts_where_it_should(recipe):
    base = read_manifest(recipe.checkpoints/'base')
    warmup = manifest_of(recipe, 'colours-warmup')
    after_warmup = manifest_of(recipe, 'colours')
    alone = manifest_of(recipe, 'colours-0')
    assert after_warmup['inputs'] == {'colours-warmup': warmup['content']}
    assert alone['inputs'] == {'base': base['content']}

def test_a_warm_up_of_nothing_is_refused(recipe):
    with pytest.raises(ValueError, match='share 0'):
        build_warmed(recipe, SMALL, COURSE, None, 0.)

def test_a_warm_up_that_does_not_stand_is_missed(recipe):
    with pytest.raises(FileNotFoundError):
        build_rewarded(recipe, SMALL, COURSE, None, .1)

def test_each_model_is_asked_each_benchmark(recipe):
    def never_right(gold, found):
        return False

    others = replace(BENCH, name='others', right=never_right)
    courses = [(COURSE, None), (replace(COURSE, benchmark=others), None)]
    assert build_cross(recipe, SMALL, courses)
    assert not build_cross(recipe, SMALL, courses)
    table = pl.read_parquet(recipe.folder/'transfer'/'cross'/'cross.parquet').filter(part='overall')
    variants = ['base', 'colours', 'colours-0', 'colours-warmup']
    assert sorted(table.filter(tested='others', metric='accuracy')['trained']) == ['base', 'colours']
    assert sorted(table.filter(tested='colours', metric='malformed')['trained']) == variants
    accuracy = table.filter(tested='others', metric='accuracy')['value']
    assert accuracy.to_list() == [0]*2
    assert (table.filter(metric='accuracy')['samples'] == SMALL.other_per_task).all()


def test_grpo_on_one_task_sees_its_questions_alone(recipe):
    p = replace(SMALL, ehrmind_only='shade')
    tasks = COURSE.benchmark.questions(None, p)[0].filter(split='train')['task'].value_counts().rows()
    (task, n), = tasks
    assert build_on_one(recipe, SMALL, COURSE, None, task)
    assert manifest_of(recipe, on_one('colours', task))['counts']['questions'] == n
    assert build_course(recipe, p, COURSE, None) is False  # no such task, and all else stands
    with pytest.raises(ModelError, match='no training question'):
        build_on_one(recipe, SMALL, COURSE, None, 'shade')


def test_parts_are_tasks_and_what_was_seen():
    rows = [('a', 'x', 'easy', 1), ('b', 'x', 'easy', 0), ('c', 'y', 'hard', 1)]
    found = pl.DataFrame(rows, schema=['sample_id', 'group', 'task', 'accuracy'], orient='row')
    asked = [('a', 'held_out', 'How many?'), ('b', 'held_out', 'Since when?'), ('c', 'held_out', 'How much?'),
             ('t', 'train', 'How many?')]
    questions = pl.DataFrame(asked, schema=['sample_id', 'split', 'question'], orient='row')
    parts = {name: rows['sample_id'].to_list() for name, rows in parts_of(found, questions).items()}
    assert parts == dict(overall=['a', 'b', 'c'], easy=['a', 'b'], hard=['c'], seen=['a'], unseen=['b', 'c'])


def test_balanced_accuracy_weighs_each_answer_the_same():
    found = pl.DataFrame(dict(group=['g']*5, truth=['yes', 'no', 'no', 'no', 'no'], accuracy=[0, 1, 1, 1, 1]))
    assert balanced(found)['value'] == .5
    assert balanced(found.filter(truth='no'))['value'] is None


def test_the_recipe_begins_with_a_checkpoint_of_its_own(recipe, tmp_path):
    own = recipe.checkpoints/'base'/'model'
    run, p = Run('own', tmp_path), replace(SMALL, model=str(own), ehrmind_model=str(own))
    assert build_beginning(run, p)
    assert not build_beginning(run, p)
    assert not run.checkpoints.exists()
    assert start_of(run, p) == trained(run, 'base')
    assert build_known(run, p, [(COURSE, None)])
    known = pl.read_parquet(run.folder/'transfer'/'known'/'known.parquet')
    assert (known['k'] == 12).all()
    assert not build_beginning(run, SMALL)
    assert start_of(run, SMALL) == run.checkpoints/'base'


def test_launcher_knows_its_benchmarks_only(tmp_path):
    job = dict(benchmark='os')
    (tmp_path/'job.json').write_text(json.dumps(job))
    command = [sys.executable, '-m', 'ehr_r1.ehrmind.stages', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert "no course 'os'" in done.stderr
