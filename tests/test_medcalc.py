"""MedCalc-Bench: every published answer is right and every spoilt one wrong, any text is read calmly, bad files are refused, scores as by hand."""
import csv, datetime, gzip, json, time
import polars as pl, pytest
from hypothesis import given, strategies as st
from ehr_r1.profiles import profile
from ehr_r1.data.tables import TableError
from ehr_r1.training.rewards import ehrmind_reward
from ehr_r1.transfer.question_sets import ANSWERS, RESULTS
from ehr_r1.transfer.medcalc import (BENCHMARK, CATEGORIES, COLUMNS, dates, judge, medcalc_baselines, medcalc_files, medcalc_questions,
                                     medcalc_score, numbers, read_answer, read_medcalc, right, weeks)

P = profile('smoke')
DECIMAL, INTEGER = ['decimal', '2', '23.5', '22.325', '24.675'], ['integer', '4', '4', '4', '4']
DATE, WEEKS = ['date', '13', '10/22/2021', '10/22/2021', '10/22/2021'], ['weeks', '69', *["('34 weeks', '2 days')"]*3]
GOLDS = [DECIMAL, INTEGER, DATE, WEEKS]

def row(number, calculator='6', category='physical', kind='decimal', note=None, question='What is the BMI?', truth='22', low='21', high='23'):
    return [str(number), calculator, category, kind, f'note {number}' if note is None else note, question, truth, low, high]

def files(folder, **tables):
    "Files in the published layout."
    for name, rows in tables.items():
        with open(folder/f'{name}.csv', 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([COLUMNS, *rows])
    return folder

@pytest.fixture(autouse=True)
def no_labels(monkeypatch): monkeypatch.delenv('EHR_R1_MEDCALC_LABELS', raising=False)

# the published files

@pytest.fixture(scope='module')
def published(request):
    folder = request.getfixturevalue('shared')/'data'/'medcalc-bench'
    if not folder.is_dir(): pytest.skip('shared data missing: MedCalc-Bench')
    return {name: read_medcalc(medcalc_files(folder)[name]) for name in ('test_data', 'one_shot_examples')}

def test_the_files_hold_what_the_specification_says(published):
    test = published['test_data']
    assert (len(test), test['Calculator ID'].n_unique(), len(published['one_shot_examples'])) == (1047, 55, 55)
    assert dict(test['category'].value_counts().rows()) == dict(lab=327, risk=240, physical=240, severity=80, diagnosis=60, date=60, dosage=40)
    assert set(published['one_shot_examples']['category']) == set(CATEGORIES.values())

WORDS = ['{}', ' {}\n', 'The answer is {}.', '**Final answer:** {} (rounded)', 'After 3 steps the result is {}', '<think>1 + 2 = 3</think>\n\n{}',
         '<think>99, 12/31/1999, 9 weeks 9 days</think><answer>{{"answer": "{}"}}</answer>']

@pytest.mark.parametrize('words', WORDS)
def test_every_truth_is_right_however_it_is_put(published, words):
    for rows in published.values():
        assert [g for g in rows['gold'].to_list() if not judge(g, words.format(g[2]))] == []

def spoilt(gold):
    "Wrong answers close to the right one."
    kind, _, truth, low, high = gold
    if kind == 'date':
        day = dates(truth)[0]
        return [(day + datetime.timedelta(n)).strftime('%m/%d/%Y') for n in (-1, 1, 31, 365)]
    if kind == 'weeks':
        (w, d), = weeks(truth)
        return [f'({w} weeks, {d + 1} days)', f'({w + 1} weeks, {d} days)', f'{7*w + d} days'] + [f'({d} weeks, {w} days)']*(w != d) + [f'({w - 1} weeks, {d + 7} days)']*(w > 0)
    if kind == 'integer': return [str(int(float(truth)) + n) for n in (-1, 1, 10)]
    step = max(1e-6, abs(float(high))*1e-6)
    return [repr(float(high) + step), repr(float(low) - step), repr(float(truth) + 1.1*(float(high) - float(low) + 1))] + [repr(-float(truth))]*(float(low)*float(high) > 0)

@pytest.mark.parametrize('words', WORDS)
def test_no_spoilt_answer_is_right(published, words):
    for rows in published.values():
        assert [(g, x) for g in rows['gold'].to_list() for x in spoilt(g) if judge(g, words.format(x))] == []

def test_the_answer_of_another_question_is_no_free_pass(published):
    golds = published['test_data'].filter(pl.col('gold').list.first() == 'decimal')['gold'].to_list()
    assert sum(right(g, dict(answer=h[2])) for g, h in zip(golds, golds[100:] + golds[:100])) < .05*len(golds)

# reading answers

@pytest.mark.parametrize('text', ['23.5', '23.5 mL/min', 'The answer is 23.5 mL/min/1.73 m²', 'approximately 23.5', '23,5'.replace(',', '.'), '2.35e1', '2.35 × 10¹', '2.35E+01',
                                  '47/2', '23 1/2', '23½', '23.5%', '$23.5', '\\boxed{23.5}', '23.5\u00a0kg', '(23.5,)', '["23.5"]', 'BMI = 65/(1.7*1.63) = 23.5', '24.675', '22.325', '023.50'])
def test_a_decimal_in_many_forms(text): assert right(DECIMAL, {'answer': text})

@pytest.mark.parametrize('text', ['', 'none', 'twenty-three', '24.676', '22.324', '-23.5', '−23.5', '235', '2.35', '23.5e2', '23500/0', 'nan', 'inf', '10^23', 'x23.5', 'The answer is 12, not 23.5', '23.5 or 99'])
def test_what_is_not_that_decimal(text): assert not right(DECIMAL, {'answer': text})

@pytest.mark.parametrize('value,ok', [(4, True), (4.0, True), ('4 points', True), ('4/9 of the scale is 4', True), ('4 out of 9', True), (4.5, True), (3.5, True), ('4.49', True), (3.49, False), (4.51, False), (-4, False),
                                      ('CHA2DS2-VASc: 4', True), ('Answer: FIB-4 = 3', False), ('10-year risk class 4', True), ('1,004', False), (10**400, False), ('9'*5000, False), (True, False), (None, False), ([4], False),
                                      (float('nan'), False), (float('inf'), False)])
def test_integers_after_rounding(value, ok): assert right(INTEGER, {'answer': value}) is ok

def test_thousands(): assert [numbers(t) for t in ('1,234.5', '12\u202f345', '1\u00a0234\u00a0567', '1,23', '12345')] == [[1234.5], [12345], [1234567], [1, 23], [12345]]

@pytest.mark.parametrize('text', ['10/22/2021', '2021-10-22', 'October 22, 2021', '22 Oct 2021', 'Oct. 22nd, 2021', '10-22-2021', 'LMP 01/15/2021. The answer is 10/22/2021', 'From 01/15/2021: 10/22/2021'])
def test_dates_in_many_forms(text): assert right(DATE, {'answer': text})

@pytest.mark.parametrize('value', ['10/23/2021', '22/10/2021', '10/22/21', '10/22', '10/22/20211', '110/22/2021', 20211022, '02/30/2021', 'tomorrow', '10/22/2021 or 10/23/2021'])
def test_what_is_not_that_date(value): assert not right(DATE, {'answer': value})

@pytest.mark.parametrize('text', ['(34 weeks, 2 days)', "('34 weeks', '2 days')", '["34 weeks", "2 days"]', '34 weeks and 2 days', '34w2d', '34+2', '(34, 2)', '34 2/7 weeks', '34 weeks, 2 days (240 days)', '34\u00a0weeks 2\u00a0days'])
def test_weeks_and_days_in_many_forms(text): assert right(WEEKS, {'answer': text})

@pytest.mark.parametrize('value', ['(2 weeks, 34 days)', '33 weeks 9 days', '34 weeks', '34.2 weeks', 34.2, '240 days', '134 weeks 2 days', '34 weeks 22 days', '34-2', '-34 weeks 2 days'])
def test_what_are_not_those_weeks(value): assert not right(WEEKS, {'answer': value})

def test_a_completion_is_read_in_both_forms():
    assert judge(DECIMAL, '<think>23.5</think><answer>{"answer": 99}</answer>') is False
    assert judge(DECIMAL, '<think>99</think>\n23.5') and judge(DECIMAL, '<think>99</think><answer>23.5 kg</answer>')
    assert judge(WEEKS, '<think>x</think><answer>{"answer": ["34 weeks", "2 days"]}</answer>')
    assert [judge(DECIMAL, t) for t in (None, '', '<think>23.5', '<think>x</think> none')] == [None]*4
    assert ehrmind_reward('<think>x</think><answer>{"answer": "23.5 kg"}</answer>', lambda a: right(DECIMAL, a), BENCHMARK.keys) == 1.1

# any text

PIECES = ['answer is', 'answer:', '<answer>', '</answer>', '{"answer": ', '}', '9'*400, '1/0', '1e999', '-', '−', ',', '.', '/', '^', '10^', ' x ', ' weeks', ' days', '12/31/9999', '00/00/0000', '99999', '½', '²', '\u00a0',
          '٣', '１', '\ud800', '\x00', '<think>', '</think>', 'per ', 'out of ', 'Feb 30, 2020']
TEXT = st.text(st.characters(codec=None), max_size=60) | st.lists(st.sampled_from(PIECES) | st.integers(0, 99).map(str), max_size=12).map(''.join)
SCALAR = TEXT | st.none() | st.booleans() | st.integers() | st.floats() | st.lists(st.integers(), max_size=2)

@given(SCALAR, st.sampled_from(GOLDS))
def test_the_judge_is_total(value, gold):
    assert right(gold, {'answer': value}) in (True, False) and right(gold, value) is False
    if isinstance(value, str):
        assert judge(gold, value) in (True, False, None)
        if right(gold, {'answer': value}): assert len(read_answer(gold[0], value)) == 1

@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(['{!r}', 'it is {!r} mg', 'answer: {!r}, of 7', '{!r}\n']))
def test_a_number_is_read_as_it_was_written(x, words): assert read_answer('decimal', words.format(x)) == (x,)

@given(st.integers(-10**12, 10**12), st.booleans())
def test_thousands_marks_change_nothing(n, marked): assert numbers(f'{n:,}' if marked else str(n)) == [n]

@given(st.dates(datetime.date(1900, 1, 1)), st.sampled_from(['%m/%d/%Y', '%Y-%m-%d', '%B %d, %Y', '%d %b %Y']), st.integers(-1000, 1000))
def test_only_the_same_day_is_right(day, form, off):
    try: other = day + datetime.timedelta(off)
    except OverflowError: return
    gold = ['date', '13', *[day.strftime('%m/%d/%Y')]*3]
    assert right(gold, {'answer': other.strftime(form)}) is (off == 0)

@given(st.tuples(st.integers(0, 60), st.integers(0, 6)), st.tuples(st.integers(0, 60), st.integers(0, 6)))
def test_only_the_same_weeks_and_days_are_right(a, b):
    gold = ['weeks', '69', *["('{} weeks', '{} days')".format(*a)]*3]
    assert right(gold, {'answer': '({} weeks, {} days)'.format(*b)}) is (a == b)

@given(st.text('0123456789.,/^eEx -+\u00a0', max_size=40), st.text('0123456789.,/^eEx -+\u00a0', max_size=40))
def test_digits_and_signs_in_any_order(a, b):
    assert all(isinstance(x, float) for x in numbers(a + b)) and isinstance(dates(a + b) + weeks(b + a), list)

HOSTILE = ['9', '1,234', '1,234,', '1 ', '1/', '1 1/', '1 x ', '10^', '1.', '1e', '-', '+1', '12/', '12/31/', '1 week ', '1w', '1 week,  ', "'", 'answer: ', 'answer', '<answer>', 'Jan 1 ', '\u00a0', '²', '½', '\n', 'a', '<think>', '{', '\\"']

@pytest.mark.parametrize('piece', HOSTILE)
def test_ten_million_hostile_characters_take_a_moment(piece):
    text = (piece*(10**7//len(piece)))[:10**7]
    for gold in GOLDS:
        start = time.process_time()
        right(gold, {'answer': text})
        assert time.process_time() - start < 1

@pytest.mark.parametrize('read', [numbers, dates, weeks])
def test_the_readers_themselves_take_time_in_proportion(read):
    "They also read notes, which are not cut. A quadratic one would take minutes."
    for piece in HOSTILE:
        text = (piece*(40_000//len(piece) + 1))[:40_000] + '^x'
        start = time.process_time()
        read(text)
        assert time.process_time() - start < 1, piece

def test_nothing_is_executed(tmp_path):
    for code in (f"__import__('pathlib').Path({str(tmp_path/'x')!r}).touch()", "23.5 if open('/etc/passwd') else 0", '10**10**10', '9**9**9', '(lambda: 23.5)() - 0*99'):
        for gold in GOLDS: right(gold, {'answer': code}); judge(gold, f'<think>x</think><answer>{json.dumps(dict(answer=code))}</answer>')
    assert not list(tmp_path.iterdir()) and not right(DECIMAL, {'answer': '20 + 3.5'})

# files

def test_files_that_cannot_be_believed(tmp_path):
    def refused(words, **tables):
        with pytest.raises(TableError) as e: medcalc_questions(files(tmp_path, **tables), P)
        assert all(w in str(e.value) for w in words), e.value
    with pytest.raises(TableError, match='test_data.csv'): medcalc_files(tmp_path)
    refused(['test_data.csv', 'Row Number, row 3', 'number 7 stands twice'], test_data=[row(7), row(8), row(7)])
    refused(['Category, row 2', 'heart'], test_data=[row(1), row(2, category='heart')])
    refused(['Output Type, row 1'], test_data=[row(1, kind='text')])
    for bad in (dict(truth=''), dict(low='x'), dict(high='nan'), dict(truth='1e999'), dict(kind='integer', truth='inf'), dict(kind='date', truth='02/30/2021'), dict(kind='date', truth='22'),
                dict(calculator='69', kind='integer', truth='34'), dict(truth='__import__("os")')):
        refused(['Ground Truth Answer, row 2'], test_data=[row(1), row(2, **bad)])
    (tmp_path/'test_data.csv').write_text('Row Number,Question\n1,x\n')
    with pytest.raises(TableError, match='test_data.csv, column Calculator ID'): medcalc_questions(tmp_path, P)
    (tmp_path/'test_data.csv').write_bytes((','.join(COLUMNS) + '\n' + ','.join(row(1, note='caf\u00e9'))).encode('latin-1'))
    with pytest.raises(TableError, match='line 2 is not UTF-8'): medcalc_questions(tmp_path, P)
    (tmp_path/'test_data.csv').unlink()
    whole = gzip.compress('\n'.join(','.join(r) for r in [COLUMNS, *(row(n) for n in range(500))]).encode())
    (tmp_path/'test_data.csv.gz').write_bytes(whole)
    assert len(medcalc_questions(tmp_path, P)[0]) == 500
    (tmp_path/'test_data.csv.gz').write_bytes(whole[:len(whole)//2])
    with pytest.raises(TableError, match='fetch it again'): medcalc_questions(tmp_path, P)

def test_rows_that_cannot_be_asked_are_counted(tmp_path):
    asked, counts = medcalc_questions(files(tmp_path, test_data=[row(1), row(2, note=' \n'), row(3, question=''), row(4, truth='24')]), P)
    assert asked['sample_id'].to_list() == ['held_out-1', 'held_out-4']
    assert (counts['held_out left out, empty note or question'], counts['held_out outside their own limits'], counts['held_out rows']) == (2, 1, 4)

def test_the_splits_are_levelled(tmp_path):
    kinds = [row(1, '49', 'dosage conversion', note='n'), row(2, '69', 'date', 'date', truth="('1 week', '5 days')"), row(3, '8', 'risk', 'integer', truth='1.5', low='1.5', high='1.5'), row(4, '5', 'lab test', note='n')]
    asked, _ = medcalc_questions(files(tmp_path, train_data=kinds, test_data=[row(1)]), P)
    train = asked.filter(pl.col('split') == 'train')
    assert train['task'].to_list() == ['dosage', 'date', 'risk', 'lab'] and train['gold'].list.first().to_list() == ['decimal', 'weeks', 'decimal', 'decimal']
    assert not right(train['gold'][2].to_list(), {'answer': 2}) and right(train['gold'][2].to_list(), {'answer': 1.5})
    assert train['group'][0] == train['group'][3] != train['group'][1] and asked['sample_id'].is_unique().all()
    assert all('<answer>{"answer": ' in q for q in asked['question'])

# scores

def answers(**texts): return pl.DataFrame([dict(sample_id=f"held_out-{k.removeprefix('n')}", text=t, risk=None, status='answered') for k, t in texts.items()], schema=ANSWERS)

def table(results, metric='accuracy'): return {(r['system'], r['task']): (r['value'], r['samples'], r['missing']) for r in results.filter(pl.col('metric') == metric).iter_rows(named=True)}

SIX = [row(1, question='A'), row(2, question='B'), row(3, category='lab', question='A'), row(4, category='lab', note='note 1', question='C '), row(5, '4', 'risk', 'integer', truth='3', low='3', high='3', question='D'),
       row(6, '13', 'date', 'date', truth='10/22/2021', question='E')]

def test_scores_as_by_hand(tmp_path):
    asked, _ = medcalc_questions(files(tmp_path, test_data=SIX), P)
    results = medcalc_score(asked, dict(a=answers(n1='22', n2='24', n3='21.5', n4=None, n5='<think>x</think> 3 points', n6='none'), b=answers(n5='4', n6='2021-10-22')), P)
    assert results.schema == RESULTS and set(results['metric']) == {'accuracy'}
    assert table(results) == {('a', 'overall'): (.5, 6, 2), ('a', 'physical'): (.5, 2, 0), ('a', 'lab'): (.5, 2, 1), ('a', 'risk'): (1, 1, 0), ('a', 'date'): (0, 1, 1),
                              ('b', 'overall'): (.5, 2, 0), ('b', 'risk'): (0, 1, 0), ('b', 'date'): (1, 1, 0)}
    overall = results.filter(pl.col('system') == 'a', pl.col('task') == 'overall').row(0, named=True)
    assert overall['groups'] == 5 and 0 <= overall['low'] < .5 < overall['high'] <= 1 # rows 1 and 4 share a note

def test_seen_and_unseen_are_told_apart_only_with_a_training_file(tmp_path):
    files(tmp_path, test_data=SIX, one_shot_examples=[row(1, question='A')])
    given = dict(a=answers(n1='22', n2='22', n3='0', n4='0', n5='3', n6='none'))
    assert set(medcalc_score(medcalc_questions(tmp_path, P)[0], given, P)['metric']) == {'accuracy'}
    results = medcalc_score(medcalc_questions(files(tmp_path, train_data=[row(1, question='A'), row(2, question='C'), row(3, question='D')]), P)[0], given, P)
    assert table(results, 'accuracy_seen')['a', 'overall'] == (2/3, 3, 0) and table(results, 'accuracy_unseen')['a', 'overall'] == (1/3, 3, 1) # 'C' is not 'C '

def test_second_labels(tmp_path, monkeypatch):
    files(tmp_path, test_data=SIX)
    labels = tmp_path/'audit.csv'; monkeypatch.setenv('EHR_R1_MEDCALC_LABELS', str(labels))
    with pytest.raises(TableError, match='audit.csv'): medcalc_questions(tmp_path, P)
    labels.write_text('Row Number,Ground Truth Answer,Lower Limit,Upper Limit\n1,40,,\n2,40,30,50\n4,,,\n5,4,,\n6,10/23/2021,,\n')
    asked, counts = medcalc_questions(tmp_path, P)
    assert (counts['second labels'], counts['second labels without an answer']) == (5, 1) and medcalc_files(tmp_path)['labels'] == labels
    results = medcalc_score(asked, dict(a=answers(n1='38.1', n2='31', n3='22', n4='22', n5='3', n6='10/23/2021'), b=answers(n1='37.9', n2='29', n3='0', n4='0', n5='4', n6='10/22/2021')), P)
    assert table(results)['a', 'overall'] == (.5, 6, 0) and table(results, 'accuracy_second')['a', 'overall'] == (4/5, 5, 0)
    assert table(results, 'accuracy_second')['b', 'overall'] == (1/5, 5, 0)
    for text, words in (('Row Number,Ground Truth Answer\n9,1\n', 'no row'), ('Row Number,Ground Truth Answer\n1,1\n1,2\n', 'twice'), ('Row Number,Ground Truth Answer\n1,x\n', 'cannot be read'), ('Row Number\n1\n', 'Ground Truth')):
        labels.write_text(text)
        with pytest.raises(TableError, match=words): medcalc_questions(tmp_path, P)

def test_baselines_know_training_answers_and_nothing_else(tmp_path):
    test = [row(1, note='aged 40, 22 kg/m2'), row(2, '4', 'risk', 'integer', note='no digits', truth='2'), row(3, '13', 'date', 'date', note='LMP 02/30/2021, then 01/02/2021', truth='10/22/2021'), row(4, '69', 'date', 'integer', note='at 3 weeks', truth="('1 week', '5 days')"), row(5, '99')]
    one = [row(1, truth='30'), row(2, '4', 'risk', 'integer', truth='5')]
    train = [row(n, truth=t) for n, t in enumerate(('20', '23', '90'))] + [row(10 + n, '4', 'risk', 'integer', truth=t) for n, t in enumerate('3324')] + [row(20, '13', 'date', 'date', truth='01/01/2020')]
    files(tmp_path, test_data=test, one_shot_examples=one)
    said = lambda: {n: f['text'].to_list() for n, f in medcalc_baselines(tmp_path, P, medcalc_questions(tmp_path, P)[0]).items()}
    assert said() == dict(typical=['30.0', '5', None, None, None], first_value=['40.0', None, '01/02/2021', '(3 weeks, 0 days)', '5.0'])
    files(tmp_path, train_data=train)
    assert said()['typical'] == ['23.0', '3', '01/01/2020', None, None]

def test_scores_do_not_depend_on_the_order_of_rows(tmp_path):
    asked, _ = medcalc_questions(files(tmp_path, test_data=SIX), P)
    said = medcalc_baselines(tmp_path, P, asked)
    assert medcalc_score(asked, said, P).equals(medcalc_score(asked.reverse(), said, P))
