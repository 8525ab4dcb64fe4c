"""Trial matching: files that lie are refused, no test pair is trained on, and scores agree with scikit-learn and with the hand."""
import gzip
import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ehr_r1.config import Run
from ehr_r1.data.table_files import TableError
from ehr_r1.ehrmind.calculators import right_sum
from ehr_r1.evaluation.reporting import run_report
from ehr_r1.hospital.orders import KEYS
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.training.rewards import ehrmind_answer, ehrmind_reward
from ehr_r1.transfer.benchmark_stage import build_benchmark
from ehr_r1.transfer.ehrshot.tasks import BENCHMARK, as_answer
from ehr_r1.transfer.question_sets import ANSWERS, QUESTIONS, RESULTS
from ehr_r1.transfer.trials.answers import NO_CLASS, TRIAL_CLASSES, read_class
from ehr_r1.transfer.trials.baselines import admitted, pair_features, patient_of, trial_baselines
from ehr_r1.transfer.trials.benchmark import METRICS, confusion, metrics_of, score_trials
from ehr_r1.transfer.trials.files import FIELDS, read_topics, read_trial_pairs, trial_files
from ehr_r1.transfer.trials.questions import TESTS, balanced, split_pairs, trial_questions

P = profile('smoke', replicates=100)

def trial(i, **other): return dict(nct_id=f'NCT{i:08}', brief_title=f'Study {i}', brief_summary='', inclusion_criteria=f'Asthma of kind {i}. Age 18 years or older.', exclusion_criteria='') | other
def lines(rows): return ''.join(json.dumps(r) + '\n' for r in rows)
def qrels(rows): return 'query-id\tcorpus-id\tscore\n' + ''.join(f'{a}\t{b}\t{c}\n' for a, b, c in rows)

TOPICS = [dict(_id=f'trec-2021{i}', text=f'A {20 + i}-year-old man with asthma of kind {i} & a cough.', metadata={}) for i in range(1, 11)]
JUDGED = [(f'trec-2021{i}', f'NCT{j:08}', (i + j) % 3) for i in range(1, 11) for j in range(12)]

@pytest.fixture
def folder(tmp_path):
    "Ten topics, twelve trials of which ten have a text, everything judged."
    (tmp_path/'trec_2021_topics.jsonl').write_text(lines(TOPICS))
    (tmp_path/'trec_2021_qrels.tsv.gz').write_bytes(gzip.compress(qrels(JUDGED).encode()))
    (tmp_path/'trials.jsonl.gz').write_bytes(gzip.compress(lines(trial(i) for i in range(10)).encode()))
    return tmp_path

@pytest.fixture(scope='module')
def real(shared):
    "The open files, read once."
    where = shared/'data'/'clinical-trials'
    return SimpleNamespace(folder=where, pairs=read_trial_pairs(where), questions=trial_questions(where, P))

# -- the real files

def test_real_files_have_the_published_counts(real):
    pairs, counts = real.pairs
    assert counts == dict(judgements=35_832, repeated=0, conflicting=0, topics=75, pairs=35_832, trials=374)
    assert pairs['label'].value_counts().sort('label')['count'].to_list() == [24_243, 6_019, 5_570]
    there = pairs.filter(pl.col('inclusion').is_not_null())
    assert there['label'].value_counts().sort('label')['count'].to_list() == [300, 99, 76] and (there['title'] != '').sum() >= 28
    questions, counts = real.questions
    assert len(questions) == 475 == counts['train'] + counts['transductive'] + counts['inductive'] and counts['without_text'] == 35_832 - 475
    by_topic = pl.DataFrame(counts['by_topic'], ['topic', 'judged', 'there', 'lost'], orient='row')
    assert by_topic['there'].sum() == 475 and by_topic['lost'].sum() == 35_357 and by_topic['topic'].n_unique() == 75
    assert dict(by_topic.group_by('judged').agg(pl.col('there').sum()).rows()) == dict(Irrelevant=300, Excluded=99, Eligible=76)

def test_real_questions_leak_nothing(real):
    pairs = real.pairs[0].with_columns(sample_id=pl.col('topic') + '/' + pl.col('trial'))
    q = real.questions[0].join(pairs.select('sample_id', 'note', *FIELDS), on='sample_id')
    train, held = (q.filter(pl.col('split') == s) for s in ('train', 'held_out'))
    assert not set(train['sample_id']) & set(held['sample_id']) and len(train) + len(held) == len(q)
    assert not set(train.select('note', *FIELDS).rows()) & set(held.select('note', *FIELDS).rows())
    unseen = held.filter(pl.col('task') == 'inductive')
    assert not set(train['note']) & set(unseen['note']) and set(held.filter(pl.col('task') == 'transductive')['note']) <= set(train['note'])
    topics = q['group'].n_unique()
    assert abs(unseen['group'].n_unique() - .2*topics) <= .5 and set(held['task']) == set(TESTS)
    assert not set(balanced(q, 42)['sample_id']) & set(held['sample_id'])

def test_nist_layout_reads_the_same(real, tmp_path):
    notes = read_topics(real.folder/'trec_2021_topics.jsonl', 2021)
    esc = lambda t: t.replace('&', '&amp;').replace('<', '&lt;')
    (tmp_path/'topics2021.xml').write_text('<topics task="2021 TREC Clinical Trials">\n' + ''.join(f'<topic number="{t[9:]}">\n{esc(n)}\n</topic>\n' for t, n in notes.items()) + '</topics>')
    with gzip.open(real.folder/'trec_2021_qrels.tsv.gz', 'rt') as f: rows = [l.split('\t') for l in f.read().splitlines()[1:]]
    (tmp_path/'qrels2021.txt').write_text(''.join(f'{t[9:]} 0 {n} {s}\n' for t, n, s in rows))
    shutil.copy(real.folder/'trials.jsonl.gz', tmp_path)
    assert read_topics(tmp_path/'topics2021.xml', 2021) == notes
    pairs, counts = read_trial_pairs(tmp_path)
    assert pairs.equals(real.pairs[0]) and counts == real.pairs[1]

# -- files that must be refused

def bomb(inside='<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">', use='&c;'):
    return f'<?xml version="1.0"?>\n<!DOCTYPE topics [{inside}]>\n<topics task="2021 TREC Clinical Trials"><topic number="1">{use}</topic></topics>'.encode()
def xml(*topics, task='2021 TREC Clinical Trials'): return f'<topics task="{task}">{"".join(topics)}</topics>'.encode()
one = '<topic number="1">A man.</topic>'
packed = lambda text: gzip.compress(text.encode() if isinstance(text, str) else text)
Q, T, N, X = 'trec_2021_qrels.tsv.gz', 'trec_2021_topics.jsonl', 'trials.jsonl.gz', 'topics2021.xml'
big = lines(trial(i, brief_summary='x y z '*400 + str(i)) for i in range(400))

REFUSED = {
    'column of the judgements': (Q, packed('query-id\tscore\ntrec-20211\t1\n'), 'corpus-id'),
    'key of a topic': (T, b'{"_id": "trec-20211", "note": "A man."}\n', f'{T}, column text, row 1'),
    'field of a trial': (N, packed(lines([{k: v for k, v in trial(1).items() if k != 'inclusion_criteria'}])), 'column inclusion_criteria, row 1'),
    'field that is no text': (N, packed(lines([trial(1, brief_title=None)])), 'column brief_title'),
    'topic twice': (T, lines([TOPICS[0], TOPICS[0]]).encode(), 'trec-20211 stands there twice'),
    'topic twice in XML': (X, xml(one, one), 'trec-20211 stands there twice'),
    'trial twice': (N, packed(lines([trial(1), trial(1)])), 'NCT00000001 stands there twice'),
    'empty note': (T, lines([TOPICS[0], dict(_id='trec-20212', text=' \n ')]).encode(), 'the note of topic trec-20212 is empty'),
    'empty note in XML': (X, xml(one, '<topic number="2">\n</topic>'), 'the note of topic trec-20212 is empty'),
    'topic without a number': (X, xml('<topic>A man.</topic>'), 'no topic with a number'),
    'structured topic': (X, xml('<topic number="1"><age>45</age></topic>'), 'no topic with a number'),
    'other year': (X, xml(one, task='2022 TREC Clinical Trials'), 'it does not say 2021'),
    'other year in JSON': (T, lines([dict(_id='trec-20221', text='A man.')]).encode(), 'not of 2021'),
    'topic that is not there': (Q, packed(qrels([*JUDGED, ('trec-202199', 'NCT00000001', 1)])), 'row 121: there is no topic trec-202199'),
    'judgement of 3': (Q, packed(qrels([*JUDGED, ('trec-20211', 'NCT00000099', 3)])), "column score, row 121: '3'"),
    'judgement without a value': (Q, packed(qrels(JUDGED) + 'trec-20211\tNCT00000099\n'), '2 values for 3 columns'),
    'latin-1 topics': (T, lines(TOPICS[:1]).encode() + '{"_id": "trec-20212", "text": "Sjögren"}\n'.encode('latin-1'), 'line 2 is not UTF-8'),
    'latin-1 judgements': (Q, packed(qrels(JUDGED).encode() + 'trec-20211\tNCT…'.encode('cp1252') + b'\t1\n'), 'is not UTF-8'),
    'latin-1 trials': (N, packed(lines([trial(1)]).encode() + json.dumps(trial(2, brief_title='Ménière'), ensure_ascii=False).encode('latin-1')), 'line 2 is not UTF-8'),
    'latin-1 XML': (X, xml('<topic number="1">Sjögren</topic>').decode().encode('latin-1'), 'is not UTF-8'),
    'UTF-16 topics': (T, lines(TOPICS).encode('utf-16'), 'is not UTF-8'),
    'judgements cut off': (Q, packed(qrels(JUDGED*20))[:-200], 'ends too early'),
    'trials cut off': (N, packed(big)[:-500], 'ends too early'),
    'not compressed': (N, big.encode(), 'no gzip'),
    'broken JSON': (T, lines(TOPICS[:1]).encode() + b'{"_id": \n', f'{T}, row 2: it is no JSON'),
    'deep JSON': (T, b'['*200_000 + b'\n', 'it is no JSON'),
    'list for an object': (T, b'["trec-20211", "A man."]\n', 'no JSON object'),
    'half a surrogate pair': (T, b'{"_id": "trec-20211", "text": "A \\ud800 man"}\n', 'column text, row 1'),
    'broken XML': (X, xml(one)[:-4], 'it is no XML'),
    'unescaped XML': (X, xml('<topic number="1">COPD & gout</topic>'), 'it is no XML'),
    'entity bomb': (X, bomb(), 'document type'),
    'entity that names a file': (X, bomb('<!ENTITY c SYSTEM "secret.txt">'), 'document type'),
    'entities from elsewhere': (X, bomb('<!ENTITY % d SYSTEM "secret.dtd"> %d;'), 'document type'),
    'entity that nobody declares': (X, xml('<topic number="1">&c;</topic>'), 'it is no XML'),
    'no text at all': (N, packed(lines([trial(77)])), 'none of the judged trials'),
    'trials without a word': (N, packed(lines([trial(i, brief_title='', inclusion_criteria=' ') for i in range(10)])), 'none of the judged trials'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_bad_files_are_refused_with_place_and_remedy(folder, name):
    file, data, says = REFUSED[name]
    if file == X: (folder/T).unlink()
    (folder/file).write_bytes(data)
    (folder/'secret.txt').write_text('SECRET'); (folder/'secret.dtd').write_text('<!ENTITY c "SECRET">')
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(TableError) as e: trial_questions(folder, P)
    assert says in str(e.value) and file in str(e.value) and str(e.value).endswith('.') and 'SECRET' not in str(e.value) and 'Traceback' not in str(e.value)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before

@pytest.mark.parametrize('gone, says', [(T, 'no topics 2021'), (Q, 'no judgements 2021'), (N, 'no trials')])
def test_a_missing_file_is_named(folder, gone, says):
    (folder/gone).unlink()
    with pytest.raises(TableError, match=says): trial_files(folder)

def test_two_files_of_one_kind_are_refused(folder):
    (folder/X).write_bytes(xml(one))
    with pytest.raises(TableError, match='keep one'): trial_files(folder)

def test_an_empty_folder_and_half_a_year_are_refused(tmp_path, folder):
    (tmp_path/'empty').mkdir()
    with pytest.raises(TableError, match='no topics 2021'): trial_files(tmp_path/'empty')
    (folder/'qrels2022.txt').write_text('1 0 NCT00000001 0\n')
    with pytest.raises(TableError, match='no topics 2022'): trial_files(folder)

# -- judgements

def test_equal_judgements_count_once_and_conflicting_ones_not_at_all(folder):
    more = [JUDGED[0], JUDGED[0], ('trec-20211', 'NCT00000001', (JUDGED[1][2] + 1) % 3)]
    (folder/Q).write_bytes(packed(qrels(JUDGED + more)))
    questions, counts = trial_questions(folder, P)
    assert (counts['judgements'], counts['repeated'], counts['conflicting'], counts['pairs']) == (123, 2, 2, 119)
    assert 'trec-20211/NCT00000001' not in set(questions['sample_id']) and 'trec-20211/NCT00000000' in set(questions['sample_id'])
    assert counts['without_text'] == 20 and len(questions) == 99
    assert sum(r[2] for r in counts['by_topic']) == 99 and sum(r[3] for r in counts['by_topic']) == 20

def test_both_years_together(folder):
    (folder/'topics2022.xml').write_bytes(xml(one, '<topic number="2">A woman.</topic>', task='2022 TREC Clinical Trials'))
    (folder/'qrels2022.txt').write_text('1  0\tNCT00000001 0\n\n2 0 NCT00000001 2\n')
    pairs, counts = read_trial_pairs(folder)
    assert counts['topics'] == 12 and pairs.filter(pl.col('topic').str.starts_with('trec-2022')).select('topic', 'trial', 'label', 'note').rows() == [
        ('trec-20221', 'NCT00000001', 0, 'A man.'), ('trec-20222', 'NCT00000001', 2, 'A woman.')]

def test_the_scale_is_trecs_from_file_to_reward(folder):
    "0 is not relevant, 1 excluded, 2 eligible; EHRMind's own reward has 0 and 1 swapped."
    questions, _ = trial_questions(folder, P)
    said = {s: g for s, g in questions.select('sample_id', 'gold').rows()}
    for topic, nct, score in JUDGED:
        if (gold := said.get(f'{topic}/{nct}')) is None: continue
        word = {0: 'Irrelevant', 1: 'Excluded', 2: 'Eligible'}[score]
        assert gold == [word] and right_sum(gold, dict(prediction=word, idx=score))
        swapped = {0: ('Excluded', 0), 1: ('Irrelevant', 1), 2: ('Eligible', 1)}[score]
        assert not right_sum(gold, dict(zip(KEYS, swapped)))
    assert set(sum(said.values(), [])) == set(TRIAL_CLASSES)

def test_questions_have_their_pieces_and_do_not_tell(folder):
    (folder/N).write_bytes(packed(lines(trial(i, brief_summary='Sum.', exclusion_criteria='Gout.') if i else trial(0, brief_title='') for i in range(10))))
    questions, _ = trial_questions(folder, P)
    assert questions.schema == QUESTIONS and questions['sample_id'].is_unique().all()
    for q in questions.iter_rows(named=True):
        heads = [c.partition('\n')[0] for c in q['context']]
        bare = q['sample_id'].endswith('NCT00000000')
        assert heads == ['## Scale', *([] if bare else ['## Trial summary', '## Trial title', '## Exclusion criteria']), '## Inclusion criteria', '## Patient']
        assert 'asthma of kind' in q['context'][-1] and q['group'] == q['sample_id'].split('/')[0] and q['kind'] == 'decision'
        told = [w for w in TRIAL_CLASSES if w in q['question']]
        assert told == list(TRIAL_CLASSES) and q['question'] == questions['question'][0] and q['context'][0] == questions['context'][0][0]

# -- splits

NOTE = st.sampled_from(['A man', ' a  MAN ', 'A woman', 'A boy', 'A girl', 'An infant'])
TEXT = st.sampled_from(['Adults.', 'adults. ', 'Children.', 'Asthma.', 'Gout.'])

@given(st.dictionaries(st.integers(1, 8), NOTE, min_size=1), st.dictionaries(st.integers(1, 12), TEXT, min_size=1), st.data(), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_no_test_pair_is_in_training(notes, texts, data, seed):
    asked = data.draw(st.lists(st.tuples(st.sampled_from(sorted(notes)), st.sampled_from(sorted(texts))), min_size=1, unique=True))
    pairs = pl.DataFrame([dict(topic=f'trec-2021{t}', trial=f'NCT{n:08}', label=0, note=notes[t], title='', summary='', exclusion='', inclusion=texts[n]) for t, n in asked])
    parts = split_pairs(pairs, seed)
    assert parts.drop('part').equals(pairs)
    fold = lambda x: ' '.join(x.split()).casefold()
    of = {p: [(fold(n), fold(i)) for n, i in parts.filter(pl.col('part') == p).select('note', 'inclusion').rows()] for p in ('train', *TESTS)}
    assert not set(of['train']) & set(of['transductive']) and not {n for n, _ in of['train'] + of['transductive']} & {n for n, _ in of['inductive']}
    assert {n for n, _ in of['transductive']} <= {n for n, _ in of['train']} and of['train']
    people, known = {fold(n) for n in parts['note']}, set(of['train'] + of['transductive'])
    assert len({n for n, _ in of['inductive']}) == round(.2*len(people)) and len(set(of['transductive'])) <= round(.2*len(known))
    shuffled = data.draw(st.permutations(range(len(pairs))))
    assert split_pairs(pairs[shuffled], seed)['part'].to_list() == [parts['part'][i] for i in shuffled]

def test_balanced_draws_as_many_of_each_class(folder):
    questions, counts = trial_questions(folder, P)
    train = questions.filter(pl.col('split') == 'train')
    least = min(train['gold'].list.first().value_counts()['count'])
    for most, each in ((0, least), (9, 3), (10_000, least)):
        some = balanced(questions, 1, most)
        assert some['gold'].list.first().value_counts()['count'].to_list() == [each]*3 and set(some['sample_id']) <= set(train['sample_id'])
    assert balanced(questions.sample(fraction=1, shuffle=True, seed=5), 1, 9).sort('sample_id').equals(balanced(questions, 1, 9).sort('sample_id'))
    assert balanced(questions, 2, 9)['sample_id'].to_list() != balanced(questions, 1, 9)['sample_id'].to_list()
    assert not len(balanced(questions.filter(pl.col('split') == 'held_out'), 1))

# -- answers

SCALAR = st.none() | st.booleans() | st.integers(-3, 4) | st.just(10**400) | st.floats() | st.text(max_size=12) | st.sampled_from([*TRIAL_CLASSES, 'eligible ', '\tEXCLUDED', '0', ' 1 ', '2', '1.0'])

@settings(max_examples=50, deadline=None)
@given(st.sampled_from(TRIAL_CLASSES), st.dictionaries(st.sampled_from([*KEYS, 'other']), SCALAR))
def test_the_judge_has_an_opinion_on_everything(word, answer):
    says = right_sum([word], answer)
    text, number = answer.get('prediction'), answer.get('idx')
    i = TRIAL_CLASSES.index(word)
    assert says is (isinstance(text, str) and text.strip().lower() == word.lower() and not isinstance(number, bool)
                    and (number == i or isinstance(number, str) and number.strip() == str(i)))

def test_each_class_can_be_won_and_lost():
    for word in TRIAL_CLASSES:
        for other in TRIAL_CLASSES:
            for i in range(3):
                text = f'<think>t</think><answer>{json.dumps(dict(prediction=other, idx=i))}</answer>'
                earned = ehrmind_reward(text, lambda a: right_sum([word], a), KEYS)
                assert earned == (1.1 if other == word and TRIAL_CLASSES[i] == word else 0)
                assert read_class(text) == (TRIAL_CLASSES.index(other) if TRIAL_CLASSES[i] == other else NO_CLASS)
    assert right_sum(['Excluded'], as_answer(['Excluded']))
    with pytest.raises(ValueError): right_sum(['excluded'], {}) # a label that no answer can meet

PIECE = st.sampled_from(['<think>', '</think>', '<answer>', '</answer>', '{"prediction": "Eligible", "idx": 2}', '{"idx": 1, "prediction": "Eligible"}', 'Eligible', 'not ', 'Excluded', '\n', '{', '"'])

@settings(max_examples=50, deadline=None)
@given(st.lists(PIECE, max_size=10).map(''.join) | st.text(max_size=40))
def test_any_text_is_read(text):
    got = read_class(text)
    assert got in (0, 1, 2, NO_CLASS)
    strict = ehrmind_answer(text, KEYS)
    if strict is not None: assert [right_sum([w], strict) for w in TRIAL_CLASSES] == [i == got for i in range(3)]
    if '<think>' in text and '</think>' not in text: assert got == NO_CLASS

@pytest.mark.parametrize('text, says', [('Eligible', 2), (' irrelevant \n', 0), ('<think>a</think>\nExcluded', 1), ('x</think><answer>{"prediction": "Excluded", "idx": 1}</answer>', 1), ('<answer>Excluded</answer>', NO_CLASS),
                                        ('{"prediction": "excluded", "idx": "1"}', 1), ('{"prediction": "Excluded"}', NO_CLASS), ('The patient is not eligible', NO_CLASS), ('Eligible.', NO_CLASS), ('Excluded\nExcluded', NO_CLASS),
                                        ('2', NO_CLASS), ('<think>a</think><answer>{"prediction": ["Eligible"], "idx": 2}</answer>', NO_CLASS), ('{"prediction": "Eligible", "idx": 2}'*2, NO_CLASS)])
def test_what_counts_as_said(text, says): assert read_class(text) == says

# -- metrics

@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40))
@settings(max_examples=15, deadline=None)
def test_metrics_are_those_of_scikit_learn(rows):
    gold, said = zip(*rows)
    mine = metrics_of(confusion(gold, said))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # answers outside the gold classes, one class only
        means = dict(labels=sorted(set(gold)), average='macro', zero_division=0)
        theirs = [sk.accuracy_score(gold, said), sk.balanced_accuracy_score(gold, said), sk.cohen_kappa_score(gold, said), sk.precision_score(gold, said, **means),
                  sk.recall_score(gold, said, **means), sk.f1_score(gold, said, **means)]
    for m, value in zip(METRICS, theirs):
        if m == 'kappa' and set(gold) == set(said) and len(set(gold)) == 1: assert math.isnan(mine[m]) # everything one class: chance agrees too
        else: assert mine[m] == pytest.approx(value, abs=1e-12)

def test_metrics_by_hand():
    table = [[3, 1, 0, 1], [1, 1, 1, 0], [0, 0, 2, 0]]
    by_hand = dict(accuracy=.6, balanced_accuracy=(3/5 + 1/3 + 1)/3, kappa=(.6 - .32)/(1 - .32), macro_precision=(3/4 + 1/2 + 2/3)/3, macro_recall=(3/5 + 1/3 + 1)/3, macro_f1=(6/9 + 2/5 + 4/5)/3)
    assert {k: pytest.approx(float(v)) for k, v in metrics_of(table).items()} == by_hand
    many = metrics_of([table, np.multiply(table, 7), [[0]*4]*3])
    assert many['accuracy'][:2] == pytest.approx([.6, .6]) and all(math.isnan(v[2]) for v in many.values())

def asked(*rows): # (topic, test, gold)
    return pl.DataFrame([dict(sample_id=str(i), group=t, task=test, split='train' if test == 'train' else 'held_out', kind='decision', context=[], question='?', gold=[g]) for i, (t, test, g) in enumerate(rows)], QUESTIONS)
def told(*rows): return pl.DataFrame([dict(sample_id=str(i), text=t, risk=None, status='answered') for i, t in rows], ANSWERS)

def test_scores_by_hand():
    q = asked(('a', 'transductive', 'Irrelevant'), ('a', 'transductive', 'Excluded'), ('b', 'transductive', 'Eligible'), ('c', 'inductive', 'Eligible'), ('d', 'train', 'Eligible'))
    r = score_trials(q, dict(s=told((0, 'Irrelevant'), (1, 'Eligible'), (2, 'eligible'), (3, 'no idea')), t=told((2, None))), P)
    assert r.schema == RESULTS
    at = {(x['system'], x['task'], x['metric']): x for x in r.iter_rows(named=True)}
    first = at['s', 'transductive', 'accuracy']
    assert first['value'] == pytest.approx(2/3) and (first['samples'], first['groups'], first['missing']) == (3, 2, 0) and first['low'] == .5 and first['high'] == 1 # topic a: 1 of 2, topic b: 1 of 1
    assert at['s', 'transductive', 'balanced_accuracy']['value'] == pytest.approx(2/3) and at['s', 'transductive', 'macro_precision']['value'] == pytest.approx((1 + 0 + .5)/3)
    lost = at['s', 'inductive', 'accuracy']
    assert lost['value'] == 0 and lost['missing'] == 1 and lost['low'] is None and 'one topic' in lost['note'] and 'no pair is Excluded' in lost['note']
    assert at['s', 'overall', 'accuracy']['value'] == .5 and 'pooled' in at['s', 'overall', 'accuracy']['note'] and at['t', 'transductive', 'accuracy']['samples'] == 1 and ('t', 'inductive', 'accuracy') not in at

def test_answers_that_fit_no_question_are_an_error():
    q = asked(('a', 'inductive', 'Eligible'), ('a', 'train', 'Eligible'))
    for bad in (told((7, 'Eligible')), told((1, 'Eligible')), told((0, 'Eligible'), (0, 'Eligible'))):
        with pytest.raises(ValueError, match='fit no held-out question'): score_trials(q, dict(s=bad), P)

def test_scores_do_not_depend_on_order_and_intervals_are_over_topics():
    rows = [(f't{i//8}', 'inductive', TRIAL_CLASSES[(i*i//3) % 3]) for i in range(64)]
    q, a = asked(*rows), told(*((i, TRIAL_CLASSES[i*7 % 3]) for i in range(64)))
    r = score_trials(q, dict(s=a), P)
    assert score_trials(q.reverse(), dict(s=a.sample(fraction=1, shuffle=True, seed=3)), P).equals(r)
    questions, answers = (pl.concat([f, f.with_columns(sample_id='x' + pl.col('sample_id'))]) for f in (q, a))
    twice = score_trials(questions, dict(s=answers), P)
    assert twice.select('value', 'low', 'high').to_numpy() == pytest.approx(r.select('value', 'low', 'high').to_numpy()) # no topic was added, so nothing new is known

# -- baselines

@pytest.mark.parametrize('note, says', [('48 M with HTN', (48, 'M')), ('Pt is a 22yo F otherwise well', (22, 'F')), ('74M hx of CAD', (74, 'M')), ('For 3 days; a 9 year-old girl', (9, 'F')), ('70 y/o with COPD. She', (70, 'F')),
                                        ('A 5-month-old male', (0, 'M')), ('64 years of age', (64, '')), ('Fever of 101 F for 5 days. He', (101, 'F')), ('', (None, ''))])
def test_age_and_sex_of_a_patient(note, says): assert patient_of(note) == says

@pytest.mark.parametrize('criteria, says', [('Ages 18-75', (18, 75, '')), ('1. Female aged 18-65 years old inclusive', (18, 65, 'F')), ('Men and women aged 45 and older', (45, math.inf, '')), ('Age > 18 years at signing', (18, math.inf, '')),
                                            ('Patients, ≥ 18 and < 80 years of age', (18, 80, '')), ('ECOG 0-2\nAge greater than or equal to (≥) 18 years.', (18, math.inf, '')), ('Male, age ≥ 50 years. Pain', (50, math.inf, 'M')),
                                            ('At least 2 years post-menopausal', (0, math.inf, '')), ('≥ 6 months to < 11 years of age', (0, 11, '')), ('', (0, math.inf, ''))])
def test_age_and_sex_that_a_trial_asks_for(criteria, says): assert admitted(criteria) == says

def test_features_by_hand():
    from sklearn.feature_extraction.text import TfidfVectorizer
    words = TfidfVectorizer().fit(['asthma', 'gout'])
    pairs = pl.DataFrame(dict(note=['A 20-year-old woman, asthma', 'asthma gout'], title=['asthma', ''], summary=['', ''], inclusion=['Men aged 30 to 40 years', 'gout'], exclusion=['', 'asthma']))
    assert pair_features(pairs, words) == pytest.approx(np.array([[1, 0, 0, 1, 1], [0, .5**.5, .5**.5, 0, 0]]))

def test_baselines_learn_from_training_pairs_only(folder):
    questions, _ = trial_questions(folder, P)
    said = trial_baselines(folder, P, questions)
    held = questions.filter(pl.col('split') == 'held_out')
    assert set(said) == {'majority', 'logistic'} and all(set(f['sample_id']) == set(held['sample_id']) and f.schema == ANSWERS for f in said.values())
    common = questions.filter(pl.col('split') == 'train')['gold'].list.first().value_counts(sort=True)
    assert said['majority']['text'].unique().to_list()[0] in common.filter(pl.col('count') == pl.col('count').max())['gold'].to_list()
    tested = set(held['sample_id'])
    (folder/Q).write_bytes(packed(qrels([(t, n, 2 if f'{t}/{n}' in tested else s) for t, n, s in JUDGED]))) # the tests' labels become others
    changed, _ = trial_questions(folder, P)
    assert changed['split'].equals(questions['split']) and not changed['gold'].equals(questions['gold'])
    again = trial_baselines(folder, P, changed)
    assert all(again[s].equals(said[s]) for s in said)

def test_logistic_finds_what_there_is_to_find(tmp_path):
    "Kinds of illness as words, an age limit as the criterion: far above the majority."
    sick = ('asthma', 'gout', 'psoriasis', 'epilepsy')
    (tmp_path/T).write_text(lines(dict(_id=f'trec-2021{i}', text=f'A {18 + i}-year-old man with {sick[i % 4]}.') for i in range(1, 41)))
    (tmp_path/'trials.jsonl').write_text(lines(trial(j, brief_title=sick[j % 4], inclusion_criteria=f'{sick[j % 4]}. Age {20 + 2*(j//4)} years or older.') for j in range(40)))
    judge = lambda i, j: 0 if (i - j) % 4 else 2 if 18 + i >= 20 + 2*(j//4) else 1
    (tmp_path/'trec_2021_qrels.tsv').write_text(qrels((f'trec-2021{i}', f'NCT{j:08}', judge(i, j)) for i in range(1, 41) for j in range(40)))
    questions, _ = trial_questions(tmp_path, P)
    r = score_trials(questions, trial_baselines(tmp_path, P, questions), P)
    value = {(s, t): v for s, t, m, v in r.select('system', 'task', 'metric', 'value').rows() if m == 'balanced_accuracy'}
    assert all(value['majority', t] == pytest.approx(1/3) and value['logistic', t] > .9 for t in TESTS)

def test_one_class_or_nothing_to_test_leaves_baselines_out(folder):
    (folder/Q).write_bytes(packed(qrels((t, n, 1) for t, n, _ in JUDGED)))
    questions, _ = trial_questions(folder, P)
    assert set(trial_baselines(folder, P, questions)) == {'majority'}
    (folder/Q).write_bytes(packed(qrels(JUDGED[:1])))
    questions, counts = trial_questions(folder, P)
    assert counts['train'] == 1 and trial_baselines(folder, P, questions) == {} and not len(score_trials(questions, {}, P))

# -- as a stage, and its report

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A run with nothing trained, to which answers of an invented model are added."
    root = tmp_path_factory.mktemp('trials')
    where = root/'files'
    where.mkdir()
    (where/T).write_text(lines(TOPICS)); (where/Q).write_bytes(packed(qrels(JUDGED))); (where/N).write_bytes(packed(lines(trial(i) for i in range(10))))
    run = Run('r', root)
    everything = replace(P, lm_per_task=0)
    assert build_benchmark(run, everything, BENCHMARK, where) and not build_benchmark(run, everything, BENCHMARK, where)
    for name in ('r', 'bare'):
        other = Run(name, root)
        for stage, says in (('trajectories', dict(counts=dict(access='open', source='synthetic'))), ('samples', dict(params=dict(seed=42, protocol='strict', style='compact', caps='paper')))):
            getattr(other, stage).mkdir(parents=True); (getattr(other, stage)/'manifest.json').write_text(json.dumps(says))
    return SimpleNamespace(root=root, run=run, folder=run.folder/'transfer'/'trials')

def test_the_stage_runs_without_any_model(home):
    assert {p.name for p in home.folder.iterdir()} >= {'questions.parquet', 'results.parquet', 'answers', 'manifest.json'}
    results, counts = pl.read_parquet(home.folder/'results.parquet'), read_manifest(home.folder)['counts']
    assert set(results['system']) == {'majority', 'logistic'} and set(results['metric']) == set(METRICS) and set(results['task']) == {*TESTS, 'overall'}
    assert counts['without_text'] == 20 and counts['questions'] == 100 and counts['systems'] == ['logistic', 'majority']

TEMPLATE = Path(__file__).resolve().parent.parent/'nbs'/'reports'/'11_trials.ipynb'

def test_report_with_answers_of_a_model(home):
    questions = pl.read_parquet(home.folder/'questions.parquet')
    some = questions.filter(pl.col('split') == 'held_out').group_by('task', maintain_order=True).head(5)
    form = lambda g: f'<think>t</think><answer>{json.dumps(as_answer(g))}</answer>'
    said = pl.DataFrame([dict(sample_id=s, text=form(g) if k % 5 else 'no idea', risk=None, status='answered') for k, (s, g) in enumerate(some.select('sample_id', 'gold').rows())], ANSWERS)
    said.write_parquet(home.folder/'answers'/'adapted.parquet')
    score_trials(questions, {f.stem: pl.read_parquet(f) for f in sorted((home.folder/'answers').glob('*.parquet'))}, P).write_parquet(home.folder/'results.parquet')
    out = home.root/'report'
    out.mkdir()
    run_report(TEMPLATE, out, dict(profile='smoke', run='r', seed=42), home.root)
    assert {f'{n}.{k}' for n in ('trials', 'trials_topics', 'trials_confusion') for k in ('png', 'svg', 'csv')} <= {p.name for p in out.iterdir()}
    shown = '\n'.join(json.dumps(o, ensure_ascii=False) for c in nbformat.read(out/'11_trials.ipynb', 4).cells for o in c.get('outputs', []))
    assert 'not published here' in shown and 'adapted** gave 2 answers of 10 that cannot be used' in shown and 'On the same questions' in shown
    assert '"stderr"' not in shown and str(home.root) not in shown
    table = pl.read_csv(out/'trials_confusion.csv')
    assert table.group_by('system').agg(pl.col('pairs').sum())['pairs'].unique().to_list() == [10] and table.filter(pl.col('system') == 'adapted', pl.col('answered') == 'none')['pairs'].sum() == 2
    assert pl.read_csv(out/'trials_topics.csv').select(pl.col('with_text', 'without_text').sum()).row(0) == (100, 20)
    shared = pl.read_csv(out/'trials_shared.csv')
    assert shared.filter(pl.col('test') == 'overall')['samples'].to_list() == [10]*3 and shared['system'].unique(maintain_order=True).to_list() == ['majority', 'logistic', 'adapted']

def test_report_without_answers_says_what_is_missing(home, tmp_path, monkeypatch, capsys):
    "The cells one after the other, without a kernel."
    monkeypatch.setenv('EHR_R1_HOME', str(home.root)); monkeypatch.chdir(tmp_path)
    shown = []
    space = dict(display=lambda x: shown.append(x.data))
    with matplotlib.rc_context():
        for c in nbformat.read(TEMPLATE, 4).cells:
            if c.cell_type != 'code': continue
            exec(c.source, space)
            if 'parameters' in c.metadata.get('tags', []): space |= dict(profile='smoke', run='bare', seed=42)
    assert len(shown) == 1 and 'EHR_R1_TRIALS' in shown[0] and 'qrels2021.txt' in shown[0] and 'run: bare' in capsys.readouterr().out and not list(tmp_path.iterdir())
