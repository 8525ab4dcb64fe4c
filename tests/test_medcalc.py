"""MedCalc-Bench: published answers are right and spoilt ones wrong, any text is read calmly, scores are as by hand."""
import csv
import datetime
import gzip
import json
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_r1.data.table_files import TableError
from ehr_r1.profiles import profile
from ehr_r1.training.rewards import ehrmind_reward
from ehr_r1.transfer.medcalc.answers import judge_calculation, read_answer, right_calculation
from ehr_r1.transfer.medcalc.benchmark import MEDCALC, medcalc_baselines, medcalc_questions, medcalc_score
from ehr_r1.transfer.medcalc.files import MEDCALC_CATEGORIES, MEDCALC_COLUMNS, medcalc_files, read_medcalc
from ehr_r1.transfer.medcalc.values import dates_in, numbers_in, weeks_in
from ehr_r1.transfer.question_sets import ANSWERS, RESULTS

SMOKE = profile('smoke')
DECIMAL = ['decimal', '2', '23.5', '22.325', '24.675']
INTEGER = ['integer', '4', '4', '4', '4']
DATE = ['date', '13', '10/22/2021', '10/22/2021', '10/22/2021']
WEEKS = ['weeks', '69', *["('34 weeks', '2 days')"]*3]
GOLDS = [DECIMAL, INTEGER, DATE, WEEKS]


def row(
    number,
    calculator='6',
    category='physical',
    kind='decimal',
    note=None,
    question='What is the BMI?',
    truth='22',
    low='21',
    high='23',
):
    "A row of a file in the published layout."
    if note is None:
        note = f'note {number}'
    return [str(number), calculator, category, kind, note, question, truth, low, high]


def files(folder, **tables):
    "Files in the published layout."
    for name, rows in tables.items():
        with open(folder/f'{name}.csv', 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([MEDCALC_COLUMNS, *rows])
    return folder


def questions_of(folder, **tables):
    "The questions of such files."
    asked, _ = medcalc_questions(files(folder, **tables), SMOKE)
    return asked


def is_right(gold, value):
    return right_calculation(gold, {'answer': value})


@pytest.fixture(autouse=True)
def no_labels(monkeypatch):
    monkeypatch.delenv('EHR_R1_MEDCALC_LABELS', raising=False)


# -- the published files

@pytest.fixture(scope='module')
def published(request):
    "Both files as they were published, checked."
    folder = request.getfixturevalue('shared')/'data'/'medcalc-bench'
    if not folder.is_dir():
        pytest.skip('shared data missing: MedCalc-Bench')
    paths = medcalc_files(folder)
    return SimpleNamespace(
        test=read_medcalc(paths['test_data']),
        examples=read_medcalc(paths['one_shot_examples']))


@pytest.fixture(scope='module')
def published_golds(published):
    "What is right about each of their rows."
    return [*published.test['gold'].to_list(), *published.examples['gold'].to_list()]


def test_the_files_have_the_published_size(published):
    assert len(published.test) == 1047
    assert published.test['Calculator ID'].n_unique() == 55
    assert len(published.examples) == 55


def test_the_files_have_the_published_categories(published):
    assert Counter(published.test['category']) == dict(
        lab=327,
        risk=240,
        physical=240,
        severity=80,
        diagnosis=60,
        date=60,
        dosage=40)
    assert set(published.examples['category']) == set(MEDCALC_CATEGORIES.values())


WORDINGS = [
    '{}',
    ' {}\n',
    'The answer is {}.',
    '**Final answer:** {} (rounded)',
    'After 3 steps the result is {}',
    '<think>1 + 2 = 3</think>\n\n{}',
    '<think>99, 12/31/1999, 9 weeks 9 days</think><answer>{{"answer": "{}"}}</answer>',
]


@pytest.mark.parametrize('wording', WORDINGS)
def test_every_truth_is_right_however_it_is_put(published_golds, wording):
    for gold in published_golds:
        _, _, truth, *_ = gold
        assert judge_calculation(gold, wording.format(truth)), gold


def spoilt_dates(truth):
    day, *_ = dates_in(truth)
    others = [day + datetime.timedelta(days) for days in (-1, 1, 31, 365)]
    return [other.strftime('%m/%d/%Y') for other in others]


def spoilt_weeks(truth):
    (weeks, days), = weeks_in(truth)
    wrong = [
        f'({weeks} weeks, {days + 1} days)',
        f'({weeks + 1} weeks, {days} days)',
        f'{7*weeks + days} days']
    if weeks != days:
        wrong.append(f'({days} weeks, {weeks} days)')
    if weeks > 0:
        wrong.append(f'({weeks - 1} weeks, {days + 7} days)')
    return wrong


def spoilt_decimals(truth, low, high):
    truth, low, high = float(truth), float(low), float(high)
    step = max(1e-6, abs(high)*1e-6)
    far = 1.1*(high - low + 1)
    wrong = [high + step, low - step, truth + far]
    if low*high > 0:
        wrong.append(-truth)
    return [repr(value) for value in wrong]


def spoilt_integers(truth):
    whole = int(float(truth))
    return [str(whole + off) for off in (-1, 1, 10)]


def spoilt(gold):
    "Wrong answers close to the right one."
    kind, _, truth, low, high = gold
    if kind == 'date':
        return spoilt_dates(truth)
    if kind == 'weeks':
        return spoilt_weeks(truth)
    if kind == 'integer':
        return spoilt_integers(truth)
    return spoilt_decimals(truth, low, high)


@pytest.mark.parametrize('wording', WORDINGS)
def test_no_spoilt_answer_is_right(published_golds, wording):
    for gold in published_golds:
        for wrong in spoilt(gold):
            assert not judge_calculation(gold, wording.format(wrong)), (gold, wrong)


def test_the_answer_of_another_question_is_no_free_pass(published):
    golds = [gold for gold in published.test['gold'].to_list() if gold[0] == 'decimal']
    truths = [truth for _, _, truth, *_ in golds]
    of_others = truths[100:] + truths[:100]
    won = [is_right(gold, truth) for gold, truth in zip(golds, of_others)]
    assert sum(won) < .05*len(golds)


# -- reading answers

@pytest.mark.parametrize('text', [
    '23.5',
    '023.50',
    '23.5 mL/min',
    '23.5\u00a0kg',
    '23.5%',
    '$23.5',
    '(23.5,)',
    '["23.5"]',
    '\\boxed{23.5}',
    '2.35e1',
    '2.35E+01',
    '2.35 × 10¹',
    '47/2',
    '23 1/2',
    '23½',
    'approximately 23.5',
    'The answer is 23.5 mL/min/1.73 m²',
    'BMI = 65/(1.7*1.63) = 23.5',
    '24.675',
    '22.325',
])
def test_a_decimal_in_many_forms(text):
    assert is_right(DECIMAL, text)


@pytest.mark.parametrize('text', [
    '',
    'none',
    'twenty-three',
    '24.676',
    '22.324',
    '-23.5',
    '−23.5',
    '235',
    '2.35',
    '23.5e2',
    '23500/0',
    'nan',
    'inf',
    '10^23',
    'x23.5',
    'The answer is 12, not 23.5',
    '23.5 or 99',
])
def test_what_is_not_that_decimal(text):
    assert not is_right(DECIMAL, text)


@pytest.mark.parametrize('value', [
    4,
    4.0,
    4.5,
    3.5,
    '4.49',
    '4 points',
    '4 out of 9',
    '4/9 of the scale is 4',
    'CHA2DS2-VASc: 4',
    '10-year risk class 4',
])
def test_integers_after_rounding(value):
    assert is_right(INTEGER, value) is True


@pytest.mark.parametrize('value', [
    3.49,
    4.51,
    -4,
    10**400,
    '9'*5000,
    '1,004',
    'Answer: FIB-4 = 3',
    True,
    False,
    None,
    [4],
    float('nan'),
    float('inf'),
], ids=lambda value: repr(value)[:20])
def test_what_is_not_that_integer(value):
    assert is_right(INTEGER, value) is False


@pytest.mark.parametrize('text, numbers', [
    ('1,234.5', [1234.5]),
    ('12\u202f345', [12345]),
    ('1\u00a0234\u00a0567', [1234567]),
    ('1,23', [1, 23]),
    ('12345', [12345]),
])
def test_thousands(text, numbers):
    assert numbers_in(text) == numbers


@pytest.mark.parametrize('text', [
    '10/22/2021',
    '10-22-2021',
    '2021-10-22',
    '22 Oct 2021',
    'October 22, 2021',
    'Oct. 22nd, 2021',
    'From 01/15/2021: 10/22/2021',
    'LMP 01/15/2021. The answer is 10/22/2021',
])
def test_dates_in_many_forms(text):
    assert is_right(DATE, text)


@pytest.mark.parametrize('value', [
    '10/23/2021',
    '22/10/2021',
    '10/22/21',
    '10/22',
    '10/22/20211',
    '110/22/2021',
    20211022,
    '02/30/2021',
    'tomorrow',
    '10/22/2021 or 10/23/2021',
])
def test_what_is_not_that_date(value):
    assert not is_right(DATE, value)


GFR = ['decimal', '3', '25.238', '23.976', '26.5']


@pytest.mark.parametrize('text', [
    '{"step_by_step_thinking": "GFR = 175 x ...", "answer": "25.24"}',
    '```json\n{"answer": 25.24}\n```',
    '**Answer:** 25.24 mL/min/1.73 m²',
    'Answer: $\\boxed{25.24}$ mL/min',
    'so \\boxed{25.24}. Normal is above 90.',
    'The answer is \\(25.24\\)',
    'Final answer: 25.24\n\nNote: normal is above 90.',
    '**Final Answer**\n\n25.24 mL/min, stage 4',
    'Answer:\n\n1. GFR: 25.24',
    'Answer = 175 × 2.1^-1.154 × 60^-0.203 = 25.24',
    'Answer: eGFR = 175 × (2.1)^(-1.154) × (60)^(-0.203) = 25.24 mL/min/1.73m²',
    'GFR = 175 \\times 2.1 \\approx 25.24',
    'The creatinine is a = 2. Therefore the GFR is 25.24.',
    'GFR = 25.24 mL/min. Normal is above 90.',
    "The patient's GFR is 25.24 (CKD stage 4).",
    'eGFR ≈ 25.24 mL/min/1.73 m², CKD stage 4',
    'Answer: 25.24, which corresponds to stage 4 (15-29).',
    'The GFR is 25.24, indicating severe disease (15 to 29)',
    '25.24 mL/min (normal: 90-120)',
    '25.24 ± 1.2',
    '<b>25.24</b>',
])
def test_a_right_sum_as_models_write_it(text):
    assert judge_calculation(GFR, text) is True


@pytest.mark.parametrize('text', [
    'Answer: 52.24',
    'between 20 and 30',
    'between 25 and 30',
    'Answer: 25 to 26',
    '20-25 mL/min',
    '20 mL/min - 25 mL/min',
    '30 or 25',
    '1.24 + 25',
    'more than 25',
    '> 25',
    '≥25',
    'The creatinine is 25. Answer: 20-30',
    'Answer: 2.1 (25.24)',
    'GFR = 90 (was 25.24)',
    'Answer: 25.24 - 3.1 = 22.14',
])
def test_a_wrong_or_hedged_sum_is_not_right(text):
    assert not judge_calculation(GFR, text)


@pytest.mark.parametrize('kind, text, value', [
    ('integer', 'The score is 3, which corresponds to a risk of 3.2% per year.', 3),
    ('integer', 'Total: 1 + 1 + 1 = 3 out of 9', 3),
    ('integer', 'Score: 3 of 9 points', 3),
    ('date', 'The due date is 12/02/2000 (40 weeks from the LMP of 02/24/2000).', datetime.date(2000, 12, 2)),
    ('weeks', '34 weeks and 2 days (240 days)', (34, 2)),
    ('weeks', "['34 weeks',\n '2 days']", (34, 2)),
])
def test_the_value_beside_others(kind, text, value):
    assert read_answer(kind, text) == (value,)


@pytest.mark.parametrize('text', ['10/22/2021 or 10/23/2021', 'between 10/22/2021 and 10/23/2021'])
def test_two_dates_are_no_date(text):
    assert read_answer('date', text) == ()


def test_a_month_in_strange_letters_is_no_day():
    assert dates_in('ſep 1, 2021') == [None]


@pytest.mark.parametrize('text', [
    '(34 weeks, 2 days)',
    "('34 weeks', '2 days')",
    '["34 weeks", "2 days"]',
    '34 weeks and 2 days',
    '34 weeks, 2 days (240 days)',
    '34\u00a0weeks 2\u00a0days',
    '34 2/7 weeks',
    '34w2d',
    '34+2',
    '(34, 2)',
])
def test_weeks_and_days_in_many_forms(text):
    assert is_right(WEEKS, text)


@pytest.mark.parametrize('value', [
    '(2 weeks, 34 days)',
    '33 weeks 9 days',
    '34 weeks',
    '34.2 weeks',
    34.2,
    '240 days',
    '134 weeks 2 days',
    '34 weeks 22 days',
    '34-2',
    '-34 weeks 2 days',
])
def test_what_are_not_those_weeks(value):
    assert not is_right(WEEKS, value)


@pytest.mark.parametrize('gold, text, verdict', [
    (DECIMAL, '<think>23.5</think><answer>{"answer": 99}</answer>', False),
    (DECIMAL, '<think>99</think>\n23.5', True),
    (DECIMAL, '<think>99</think><answer>23.5 kg</answer>', True),
    (WEEKS, '<think>x</think><answer>{"answer": ["34 weeks", "2 days"]}</answer>', True),
    (DECIMAL, None, None),
    (DECIMAL, '', None),
    (DECIMAL, '<think>23.5', None),
    (DECIMAL, '<think>x</think> none', None),
])
def test_a_completion_is_read_in_both_forms(gold, text, verdict):
    assert judge_calculation(gold, text) is verdict


def test_the_benchmark_pays_the_reward():
    text = '<think>x</think><answer>{"answer": "23.5 kg"}</answer>'
    judge = partial(MEDCALC.right, DECIMAL)
    assert ehrmind_reward(text, judge, MEDCALC.keys) == 1.1


# -- any text

TAGS = ['<think>', '</think>', '<answer>', '</answer>', '{"answer": ', '}']
WORDS = ['answer is', 'answer:', ' weeks', ' days', 'per ', 'out of ']
SIGNS = ['-', '−', ',', '.', '/', '^', '10^', ' x ']
NUMBERS = ['9'*400, '1/0', '1e999', '99999', '½', '²', '٣', '１']
DATES = ['12/31/9999', '00/00/0000', 'Feb 30, 2020', 'ſep 1, 2020']
ODD_LETTERS = ['\u00a0', '\ud800', '\x00']
PIECES = [*TAGS, *WORDS, *SIGNS, *NUMBERS, *DATES, *ODD_LETTERS]
piece = st.sampled_from(PIECES) | st.integers(0, 99).map(str)
pieces = st.lists(piece, max_size=12).map(''.join)
any_letter = st.characters(codec=None)
texts = st.text(any_letter, max_size=60) | pieces
values = st.one_of(
    texts,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(st.integers(), max_size=2))


@given(values, st.sampled_from(GOLDS))
def test_right_is_total(value, gold):
    assert is_right(gold, value) in (True, False)
    assert right_calculation(gold, value) is False


@given(texts, st.sampled_from(GOLDS))
def test_the_judge_is_total(text, gold):
    assert judge_calculation(gold, text) in (True, False, None)
    if is_right(gold, text):
        assert len(read_answer(gold[0], text)) == 1


finite = st.floats(allow_nan=False, allow_infinity=False)
wordings = st.sampled_from(['{!r}', 'it is {!r} mg', 'answer: {!r}, of 7', '{!r}\n'])


@given(finite, wordings)
def test_a_number_is_read_as_it_was_written(number, wording):
    assert read_answer('decimal', wording.format(number)) == (number,)


@given(st.integers(-10**12, 10**12), st.booleans())
def test_thousands_marks_change_nothing(number, marked):
    written = f'{number:,}' if marked else str(number)
    assert numbers_in(written) == [number]


earliest, latest = datetime.date(1900, 1, 1), datetime.date(9990, 1, 1)
days = st.dates(earliest, latest)
spellings = st.sampled_from(['%m/%d/%Y', '%Y-%m-%d', '%B %d, %Y', '%d %b %Y'])


@given(days, spellings, st.integers(-1000, 1000))
def test_only_the_same_day_is_right(day, spelling, off):
    other = day + datetime.timedelta(off)
    truth = day.strftime('%m/%d/%Y')
    gold = ['date', '13', truth, truth, truth]
    assert is_right(gold, other.strftime(spelling)) is (off == 0)


ages = st.tuples(st.integers(0, 60), st.integers(0, 6))


@given(ages, ages)
def test_only_the_same_weeks_and_days_are_right(truth, said):
    written = "('{} weeks', '{} days')".format(*truth)
    gold = ['weeks', '69', written, written, written]
    answer = '({} weeks, {} days)'.format(*said)
    assert is_right(gold, answer) is (truth == said)


@given(st.text('0123456789.,/^eEx -+\u00a0', max_size=80))
def test_digits_and_signs_in_any_order(text):
    assert all(isinstance(number, float) for number in numbers_in(text))
    assert all(day is None or isinstance(day, datetime.date) for day in dates_in(text))
    assert all(len(age) == 2 for age in weeks_in(text))


HOSTILE_NUMBERS = ['9', '1,234', '1,234,', '1 ', '1/', '1 1/', '1 x ', '10^', '1.', '1e', '+1', '²', '½']
HOSTILE_DATES = ['12/', '12/31/', 'Jan 1 ', '1 week ', '1 week,  ', '1w']
HOSTILE_WORDS = ['answer', 'answer: ', '<answer>', '<think>', 'a']
HOSTILE_MARKS = ['-', "'", '{', '\\"', '\n', '\u00a0']
HOSTILE = [*HOSTILE_NUMBERS, *HOSTILE_DATES, *HOSTILE_WORDS, *HOSTILE_MARKS]


def seconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


@pytest.mark.parametrize('piece', HOSTILE)
def test_ten_million_hostile_characters_take_a_moment(piece):
    text = (piece*10**7)[:10**7]
    for gold in GOLDS:
        assert seconds(is_right, gold, text) < 1


@pytest.mark.parametrize('read', [numbers_in, dates_in, weeks_in])
@pytest.mark.parametrize('piece', HOSTILE)
def test_the_readers_themselves_take_time_in_proportion(read, piece):
    "They also read notes, which are not cut. A quadratic one would take minutes."
    text = (piece*40_000)[:40_000]
    assert seconds(read, f'{text}^x') < 1


@pytest.mark.parametrize('code', [
    "__import__('pathlib').Path(PATH).touch()",
    "23.5 if open('/etc/passwd') else 0",
    '10**10**10',
    '9**9**9',
    '(lambda: 23.5)() - 0*99',
])
def test_nothing_is_executed(tmp_path, code):
    code = code.replace('PATH', repr(str(tmp_path/'x')))
    answer = json.dumps(dict(answer=code))
    for gold in GOLDS:
        is_right(gold, code)
        judge_calculation(gold, f'<think>x</think><answer>{answer}</answer>')
    assert not list(tmp_path.iterdir())


def test_nothing_is_calculated():
    assert not is_right(DECIMAL, '20 + 3.5')


# -- files

def test_a_missing_test_file_is_named(tmp_path):
    with pytest.raises(TableError, match='test_data.csv'):
        medcalc_files(tmp_path)


@pytest.mark.parametrize('last, words', [
    (row(7), ['test_data.csv', 'Row Number, row 3', 'number 7 stands twice']),
    (row(9, category='heart'), ['Category, row 3', 'heart']),
    (row(9, kind='text'), ['Output Type, row 3']),
], ids=['twice', 'category', 'type'])
def test_rows_that_cannot_be_believed(tmp_path, last, words):
    with pytest.raises(TableError) as error:
        questions_of(tmp_path, test_data=[row(7), row(8), last])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize('bad', [
    dict(truth=''),
    dict(truth='1e999'),
    dict(truth='__import__("os")'),
    dict(low='x'),
    dict(high='nan'),
    dict(kind='integer', truth='inf'),
    dict(kind='date', truth='02/30/2021'),
    dict(kind='date', truth='22'),
    dict(calculator='69', kind='integer', truth='34'),
], ids=str)
def test_answers_that_cannot_be_read_are_named(tmp_path, bad):
    rows = [row(1), row(2, **bad)]
    with pytest.raises(TableError, match='Ground Truth Answer, row 2'):
        questions_of(tmp_path, test_data=rows)


def test_a_missing_column_is_named(tmp_path):
    (tmp_path/'test_data.csv').write_text('Row Number,Question\n1,x\n')
    with pytest.raises(TableError, match='test_data.csv, column Calculator ID'):
        medcalc_questions(tmp_path, SMOKE)


def test_another_encoding_is_refused(tmp_path):
    lines = [MEDCALC_COLUMNS, row(1, note='caf\u00e9')]
    text = '\n'.join(','.join(line) for line in lines)
    (tmp_path/'test_data.csv').write_bytes(text.encode('latin-1'))
    with pytest.raises(TableError, match='line 2 is not UTF-8'):
        medcalc_questions(tmp_path, SMOKE)


@pytest.fixture
def compressed():
    "Five hundred rows in a gzip file."
    rows = [row(number) for number in range(500)]
    text = '\n'.join(','.join(line) for line in [MEDCALC_COLUMNS, *rows])
    return gzip.compress(text.encode())


def test_compressed_files_are_read(tmp_path, compressed):
    (tmp_path/'test_data.csv.gz').write_bytes(compressed)
    asked, _ = medcalc_questions(tmp_path, SMOKE)
    assert len(asked) == 500


def test_half_a_compressed_file_is_refused(tmp_path, compressed):
    half = compressed[:len(compressed)//2]
    (tmp_path/'test_data.csv.gz').write_bytes(half)
    with pytest.raises(TableError, match='fetch it again'):
        medcalc_questions(tmp_path, SMOKE)


def test_rows_that_cannot_be_asked_are_counted(tmp_path):
    no_note = row(2, note=' \n')
    no_question = row(3, question='')
    outside = row(4, truth='24')
    rows = [row(1), no_note, no_question, outside]
    asked, counts = medcalc_questions(files(tmp_path, test_data=rows), SMOKE)
    assert asked['sample_id'].to_list() == ['held_out-1', 'held_out-4']
    assert counts['held_out left out, empty note or question'] == 2
    assert counts['held_out outside their own limits'] == 1
    assert counts['held_out rows'] == 4


@pytest.fixture
def levelled(tmp_path):
    "Questions of rows as the training file calls them, and of one test row."
    train = [
        row(1, '49', 'dosage conversion', note='n'),
        row(2, '69', 'date', 'date', truth="('1 week', '5 days')"),
        row(3, '8', 'risk', 'integer', truth='1.5', low='1.5', high='1.5'),
        row(4, '5', 'lab test', note='n'),
    ]
    return questions_of(tmp_path, train_data=train, test_data=[row(1)])


@pytest.fixture
def for_training(levelled):
    return levelled.filter(split='train')


def test_categories_and_kinds_are_levelled(for_training):
    kinds = for_training['gold'].list.first()
    assert for_training['task'].to_list() == ['dosage', 'date', 'risk', 'lab']
    assert kinds.to_list() == ['decimal', 'weeks', 'decimal', 'decimal']


def test_a_score_that_is_not_whole_is_not_rounded(for_training):
    _, _, of_risk, _ = for_training['gold'].to_list()
    assert not is_right(of_risk, 2)
    assert is_right(of_risk, 1.5)


def test_questions_about_one_note_are_one_group(for_training):
    first, second, _, last = for_training['group']
    assert first == last != second


def test_questions_have_ids_and_a_form(levelled):
    assert levelled['sample_id'].is_unique().all()
    assert all('<answer>{"answer": ' in question for question in levelled['question'])


# -- scores

def answers(*said):
    "Answers from (row number, text)."
    rows = [(f'held_out-{number}', text, None, 'answered') for number, text in said]
    return pl.DataFrame(rows, schema=ANSWERS, orient='row')


def table(results, metric='accuracy'):
    "(system, task) -> (value, questions, missing answers)."
    rows = results.filter(metric=metric)
    numbers = rows.select('system', 'task', 'value', 'samples', 'missing')
    return numbers.rows_by_key(['system', 'task'], unique=True)


SIX = [
    row(1, question='A'),
    row(2, question='B'),
    row(3, category='lab', question='A'),
    row(4, category='lab', note='note 1', question='C '),
    row(5, '4', 'risk', 'integer', truth='3', low='3', high='3', question='D'),
    row(6, '13', 'date', 'date', truth='10/22/2021', question='E'),
]


@pytest.fixture
def by_hand(tmp_path):
    of_all = answers(
        (1, '22'),
        (2, '24'),
        (3, '21.5'),
        (4, None),
        (5, '<think>x</think> 3 points'),
        (6, 'none'))
    of_two = answers((5, '4'), (6, '2021-10-22'))
    asked = questions_of(tmp_path, test_data=SIX)
    return medcalc_score(asked, dict(a=of_all, b=of_two), SMOKE)


def test_scores_as_by_hand(by_hand):
    assert by_hand.schema == RESULTS
    assert set(by_hand['metric']) == {'accuracy'}
    assert table(by_hand) == {
        ('a', 'overall'): (.5, 6, 2),
        ('a', 'physical'): (.5, 2, 0),
        ('a', 'lab'): (.5, 2, 1),
        ('a', 'risk'): (1, 1, 0),
        ('a', 'date'): (0, 1, 1),
        ('b', 'overall'): (.5, 2, 0),
        ('b', 'risk'): (0, 1, 0),
        ('b', 'date'): (1, 1, 0),
    }


def test_intervals_are_over_notes(by_hand):
    overall = by_hand.filter(system='a', task='overall').row(0, named=True)
    assert overall['groups'] == 5  # rows 1 and 4 share a note
    assert 0 <= overall['low'] < .5 < overall['high'] <= 1


THREE_RIGHT = answers(
    (1, '22'),
    (2, '22'),
    (3, '0'),
    (4, '0'),
    (5, '3'),
    (6, 'none'))


def test_worked_examples_do_not_tell_seen_from_unseen(tmp_path):
    example = row(1, question='A')
    asked = questions_of(tmp_path, test_data=SIX, one_shot_examples=[example])
    results = medcalc_score(asked, dict(a=THREE_RIGHT), SMOKE)
    assert set(results['metric']) == {'accuracy'}


def test_a_training_file_tells_seen_from_unseen(tmp_path):
    train = [row(1, question='A'), row(2, question='C'), row(3, question='D')]
    asked = questions_of(tmp_path, test_data=SIX, train_data=train)
    results = medcalc_score(asked, dict(a=THREE_RIGHT), SMOKE)
    assert table(results, 'accuracy_seen')['a', 'overall'] == (2/3, 3, 0)
    assert table(results, 'accuracy_unseen')['a', 'overall'] == (1/3, 3, 1)  # 'C' is not 'C '


@pytest.fixture
def audit(tmp_path, monkeypatch):
    "The path of a second set of labels for six questions; the file is not there yet."
    files(tmp_path, test_data=SIX)
    labels = tmp_path/'audit.csv'
    monkeypatch.setenv('EHR_R1_MEDCALC_LABELS', str(labels))
    return labels


def test_missing_second_labels_are_named(audit):
    with pytest.raises(TableError, match='audit.csv'):
        medcalc_questions(audit.parent, SMOKE)


@pytest.mark.parametrize('text, words', [
    ('Row Number,Ground Truth Answer\n9,1\n', 'no row'),
    ('Row Number,Ground Truth Answer\n1,1\n1,2\n', 'twice'),
    ('Row Number,Ground Truth Answer\n1,x\n', 'cannot be read'),
    ('Row Number\n1\n', 'Ground Truth'),
], ids=['row', 'twice', 'value', 'column'])
def test_bad_second_labels_are_refused(audit, text, words):
    audit.write_text(text)
    with pytest.raises(TableError, match=words):
        medcalc_questions(audit.parent, SMOKE)


SECOND = '''Row Number,Ground Truth Answer,Lower Limit,Upper Limit
1,40,,
2,40,30,50
4,,,
5,4,,
6,10/23/2021,,
'''


def test_second_labels_are_counted(audit):
    audit.write_text(SECOND)
    _, counts = medcalc_questions(audit.parent, SMOKE)
    assert counts['second labels'] == 5
    assert counts['second labels without an answer'] == 1
    assert medcalc_files(audit.parent)['labels'] == audit


def test_second_labels_are_a_second_score(audit):
    audit.write_text(SECOND)
    asked, _ = medcalc_questions(audit.parent, SMOKE)
    mostly_second = answers(
        (1, '38.1'),
        (2, '31'),
        (3, '22'),
        (4, '22'),
        (5, '3'),
        (6, '10/23/2021'))
    mostly_neither = answers(
        (1, '37.9'),
        (2, '29'),
        (3, '0'),
        (4, '0'),
        (5, '4'),
        (6, '10/22/2021'))
    results = medcalc_score(asked, dict(a=mostly_second, b=mostly_neither), SMOKE)
    by_first, by_second = table(results), table(results, 'accuracy_second')
    assert by_first['a', 'overall'] == (.5, 6, 0)
    assert by_second['a', 'overall'] == (4/5, 5, 0)
    assert by_second['b', 'overall'] == (1/5, 5, 0)


# -- baselines

TEST = [
    row(1, note='aged 40, 22 kg/m2'),
    row(2, '4', 'risk', 'integer', note='no digits', truth='2'),
    row(3, '13', 'date', 'date', note='LMP 02/30/2021, then 01/02/2021', truth='10/22/2021'),
    row(4, '69', 'date', 'integer', note='at 3 weeks', truth="('1 week', '5 days')"),
    row(5, '99'),
]
EXAMPLES = [
    row(1, truth='30'),
    row(2, '4', 'risk', 'integer', truth='5'),
]
TRAIN = [
    row(0, truth='20'),
    row(1, truth='23'),
    row(2, truth='90'),
    row(10, '4', 'risk', 'integer', truth='3'),
    row(11, '4', 'risk', 'integer', truth='3'),
    row(12, '4', 'risk', 'integer', truth='2'),
    row(13, '4', 'risk', 'integer', truth='4'),
    row(20, '13', 'date', 'date', truth='01/01/2020'),
]


def baseline_texts(folder, **tables):
    asked = questions_of(folder, **tables)
    baselines = medcalc_baselines(folder, SMOKE, asked)
    return {system: said['text'].to_list() for system, said in baselines.items()}


def test_baselines_of_worked_examples(tmp_path):
    said = baseline_texts(tmp_path, test_data=TEST, one_shot_examples=EXAMPLES)
    assert said == dict(
        typical=['30.0', '5', None, None, None],
        first_value=['40.0', None, '01/02/2021', '(3 weeks, 0 days)', '5.0'])


def test_baselines_know_training_answers_and_nothing_else(tmp_path):
    said = baseline_texts(tmp_path, test_data=TEST, one_shot_examples=EXAMPLES, train_data=TRAIN)
    assert said['typical'] == ['23.0', '3', '01/01/2020', None, None]


def test_scores_do_not_depend_on_the_order_of_rows(tmp_path):
    asked = questions_of(tmp_path, test_data=SIX)
    said = medcalc_baselines(tmp_path, SMOKE, asked)
    results = medcalc_score(asked, said, SMOKE)
    of_reversed = medcalc_score(asked.reverse(), said, SMOKE)
    assert of_reversed.equals(results)
