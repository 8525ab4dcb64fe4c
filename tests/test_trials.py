"""Trial matching: bad files are refused, no test pair is trained on, scores agree with scikit-learn and the hand."""
import gzip
import json
import math
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape

import matplotlib
import nbformat
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.feature_extraction.text import TfidfVectorizer

from ehr_r1.config import Run
from ehr_r1.data.table_files import TableError
from ehr_r1.evaluation.reporting import run_report
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.training.rewards import ehrmind_answer, ehrmind_reward
from ehr_r1.transfer.benchmark_stage import build_benchmark
from ehr_r1.transfer.question_sets import ANSWERS, QUESTIONS, RESULTS
from ehr_r1.transfer.trials.answers import (
    NO_CLASS,
    TRIAL_CLASSES,
    TRIAL_KEYS,
    folded_text,
    read_class,
    right_class,
    trial_answer,
)
from ehr_r1.transfer.trials.baselines import admitted, pair_features, patient_of, trial_baselines
from ehr_r1.transfer.trials.benchmark import METRICS, TRIALS, confusion, metrics_of, score_trials
from ehr_r1.transfer.trials.files import FIELDS, read_topics, read_trial_pairs, trial_files
from ehr_r1.transfer.trials.questions import TESTS, balanced, split_pairs, trial_questions

SMOKE = profile('smoke', replicates=100)


def trial(number, **other):
    return dict(nct_id=f'NCT{number:08}', brief_title=f'Study {number}', brief_summary='', exclusion_criteria='',
                inclusion_criteria=f'Asthma of kind {number}. Age 18 years or older.') | other


def lines(rows):
    "JSON Lines."
    return ''.join(json.dumps(row) + '\n' for row in rows)


def qrels(rows):
    "Judgements, tab-separated."
    return 'query-id\tcorpus-id\tscore\n' + ''.join(f'{topic}\t{nct}\t{score}\n' for topic, nct, score in rows)


def packed(text):
    return gzip.compress(text.encode() if isinstance(text, str) else text)


TOPICS = [dict(_id=f'trec-2021{i}', text=f'A {20 + i}-year-old man with asthma of kind {i} & a cough.', metadata={})
          for i in range(1, 11)]
JUDGED = [(f'trec-2021{i}', f'NCT{j:08}', (i + j) % 3) for i in range(1, 11) for j in range(12)]
TOPIC_FILE, XML_FILE = 'trec_2021_topics.jsonl', 'topics2021.xml'
QRELS_FILE, TRIAL_FILE = 'trec_2021_qrels.tsv.gz', 'trials.jsonl.gz'


def written(folder):
    "Ten topics, twelve trials of which ten have a text, everything judged."
    (folder/TOPIC_FILE).write_text(lines(TOPICS))
    (folder/QRELS_FILE).write_bytes(packed(qrels(JUDGED)))
    (folder/TRIAL_FILE).write_bytes(packed(lines(trial(number) for number in range(10))))
    return folder


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path)


@pytest.fixture(scope='module')
def real(shared):
    "The open files, read once."
    where = shared/'data'/'clinical-trials'
    return SimpleNamespace(folder=where, pairs=read_trial_pairs(where), questions=trial_questions(where, SMOKE))


def held_out(questions):
    return questions.filter(pl.col('split') == 'held_out')


def for_training(questions):
    return questions.filter(pl.col('split') == 'train')


def sizes_of_classes(questions):
    return Counter(gold for gold, in questions['gold'])


# -- the real files

def test_real_files_have_the_published_counts(real):
    pairs, counts = real.pairs
    gaps = {name: counts.pop(name) for name in list(counts) if name.startswith('trials_without_')}
    assert counts == dict(judgements=35_832, repeated=0, conflicting=0, topics=75, pairs=35_832, trials=374)
    assert gaps['trials_without_exclusion'] == 37
    assert pairs['label'].value_counts().sort('label')['count'].to_list() == [24_243, 6_019, 5_570]


def test_real_pairs_with_text(real):
    there = real.pairs[0].filter(pl.col('inclusion').is_not_null())
    assert there['label'].value_counts().sort('label')['count'].to_list() == [300, 99, 76]
    assert (there['title'] != '').sum() >= 28


def test_real_pairs_with_text_are_asked(real):
    questions, counts = real.questions
    assert len(questions) == 475 == counts['train'] + counts['transductive'] + counts['inductive']
    assert counts['without_text'] == 35_832 - 475


def test_real_pairs_are_counted_by_topic(real):
    columns = ['topic', 'judged', 'there', 'lost']
    by_topic = pl.DataFrame(real.questions[1]['by_topic'], columns, orient='row')
    assert by_topic.select(pl.col('there', 'lost').sum()).row(0) == (475, 35_357)
    assert by_topic['topic'].n_unique() == 75
    by_class = by_topic.group_by('judged').agg(pl.col('there').sum())
    assert dict(by_class.rows()) == dict(Irrelevant=300, Excluded=99, Eligible=76)


@pytest.fixture(scope='module')
def real_sides(real):
    "The real questions with their texts: training, tests."
    pairs = real.pairs[0].with_columns(sample_id=pl.col('topic') + '/' + pl.col('trial'))
    questions = real.questions[0].join(pairs.select('sample_id', 'note', *FIELDS), on='sample_id')
    return for_training(questions), held_out(questions)


def test_real_tests_share_no_pair_with_training(real, real_sides):
    train, tests = real_sides
    assert len(train) + len(tests) == len(real.questions[0])
    assert not set(train['sample_id']) & set(tests['sample_id'])
    assert not set(train.select('note', *FIELDS).rows()) & set(tests.select('note', *FIELDS).rows())


def test_real_inductive_patients_are_new_and_transductive_ones_known(real_sides):
    train, tests = real_sides
    notes = {task: set(rows['note']) for (task,), rows in tests.group_by('task')}
    assert set(notes) == set(TESTS)
    assert not set(train['note']) & notes['inductive']
    assert notes['transductive'] <= set(train['note'])


def test_a_fifth_of_the_real_topics_is_new(real):
    questions = real.questions[0]
    new = questions.filter(pl.col('task') == 'inductive')['group'].n_unique()
    assert abs(new - .2*questions['group'].n_unique()) <= .5


def test_real_balanced_draw_is_of_training(real, real_sides):
    assert not set(balanced(real.questions[0], 42)['sample_id']) & set(real_sides[1]['sample_id'])


@pytest.fixture(scope='module')
def nist(real, tmp_path_factory):
    "The real files in NIST's layout."
    folder = tmp_path_factory.mktemp('nist')
    notes = read_topics(real.folder/TOPIC_FILE, 2021)
    topics = [f'<topic number="{topic_id[9:]}">\n{escape(note)}\n</topic>' for topic_id, note in notes.items()]
    (folder/XML_FILE).write_bytes(xml('\n'.join(topics)))
    with gzip.open(real.folder/QRELS_FILE, 'rt') as file:
        rows = [line.split('\t') for line in file.read().splitlines()[1:]]
    judged = [f'{topic[9:]} 0 {nct} {score}\n' for topic, nct, score in rows]
    (folder/'qrels2021.txt').write_text(''.join(judged))
    shutil.copy(real.folder/TRIAL_FILE, folder)
    return folder


def test_nist_topics_read_the_same(real, nist):
    assert read_topics(nist/XML_FILE, 2021) == read_topics(real.folder/TOPIC_FILE, 2021)


def test_nist_pairs_read_the_same(real, nist):
    pairs, counts = read_trial_pairs(nist)
    assert pairs.equals(real.pairs[0])
    assert counts == real.pairs[1]


# -- files that must be refused

ENTITIES = ('<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
            '<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">')
ONE = '<topic number="1">A man.</topic>'


def xml(*topics, task='2021 TREC Clinical Trials', head=''):
    return f'{head}<topics task="{task}">{"".join(topics)}</topics>'.encode()


def with_entities(declared):
    "Topics that use an entity."
    return xml('<topic number="1">&c;</topic>', head=f'<?xml version="1.0"?>\n<!DOCTYPE topics [{declared}]>\n')


def topic(number, text):
    return dict(_id=f'trec-2021{number}', text=text)


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


MANY = lines(trial(number, brief_summary='x y z '*400 + str(number)) for number in range(400))
SJOGREN = '{"_id": "trec-20212", "text": "Sjögren"}\n'.encode('latin-1')
MENIERE = json.dumps(trial(2, brief_title='Ménière'), ensure_ascii=False).encode('latin-1')
WORDLESS = [trial(number, brief_title='', inclusion_criteria=' ') for number in range(10)]

REFUSED = {  # what is wrong -> file, content, words of the error
    # topics as JSON Lines
    'key of a topic': (TOPIC_FILE, b'{"_id": "trec-20211", "note": "A man."}\n', f'{TOPIC_FILE}, column text, row 1'),
    'topic twice': (TOPIC_FILE, lines([TOPICS[0], TOPICS[0]]), 'trec-20211 stands there twice'),
    'empty note': (TOPIC_FILE, lines([TOPICS[0], topic(2, ' \n ')]), 'the note of topic trec-20212 is empty'),
    'other year': (TOPIC_FILE, lines([dict(_id='trec-20221', text='A man.')]), 'not of 2021'),
    'latin-1': (TOPIC_FILE, lines(TOPICS[:1]).encode() + SJOGREN, 'line 2 is not UTF-8'),
    'UTF-16': (TOPIC_FILE, lines(TOPICS).encode('utf-16'), 'is not UTF-8'),
    'broken JSON': (TOPIC_FILE, lines(TOPICS[:1]).encode() + b'{"_id": \n', f'{TOPIC_FILE}, row 2: it is no JSON'),
    'deep JSON': (TOPIC_FILE, b'['*200_000 + b'\n', 'it is no JSON'),
    'list for an object': (TOPIC_FILE, b'["trec-20211", "A man."]\n', 'no JSON object'),
    'half a surrogate pair': (TOPIC_FILE, lines([topic(1, 'A \ud800 man')]), 'column text, row 1'),
    # topics as XML
    'topic twice in XML': (XML_FILE, xml(ONE, ONE), 'trec-20211 stands there twice'),
    'empty note in XML': (XML_FILE, xml(ONE, '<topic number="2">\n</topic>'), 'the note of topic trec-20212 is empty'),
    'topic without a number': (XML_FILE, xml('<topic>A man.</topic>'), 'no topic with a number'),
    'structured topic': (XML_FILE, xml('<topic number="1"><age>45</age></topic>'), 'no topic with a number'),
    'other year in XML': (XML_FILE, xml(ONE, task='2022 TREC Clinical Trials'), 'it does not say 2021'),
    'latin-1 XML': (XML_FILE, xml(ONE.replace('man', 'mán')).decode().encode('latin-1'), 'is not UTF-8'),
    'broken XML': (XML_FILE, xml(ONE)[:-4], 'it is no XML'),
    'unescaped XML': (XML_FILE, xml('<topic number="1">COPD & gout</topic>'), 'it is no XML'),
    'entity bomb': (XML_FILE, with_entities(ENTITIES), 'document type'),
    'entity that names a file': (XML_FILE, with_entities('<!ENTITY c SYSTEM "secret.txt">'), 'document type'),
    'entities from elsewhere': (XML_FILE, with_entities('<!ENTITY % d SYSTEM "secret.dtd"> %d;'), 'document type'),
    'entity that nobody declares': (XML_FILE, xml('<topic number="1">&c;</topic>'), 'it is no XML'),
    # judgements
    'column of the judgements': (QRELS_FILE, packed('query-id\tscore\ntrec-20211\t1\n'), 'corpus-id'),
    'topic that is not there': (QRELS_FILE, packed(qrels([*JUDGED, ('trec-202199', 'NCT00000001', 1)])),
                                'row 121: there is no topic trec-202199'),
    'judgement of 3': (QRELS_FILE, packed(qrels([*JUDGED, ('trec-20211', 'NCT00000099', 3)])),
                       "column score, row 121: '3'"),
    'judgement without a value': (QRELS_FILE, packed(qrels(JUDGED) + 'trec-20211\tNCT00000099\n'),
                                  '2 values for 3 columns'),
    'latin-1 judgements': (QRELS_FILE, packed(qrels(JUDGED).encode() + 'trec-20211\tNCT…\t1\n'.encode('cp1252')),
                           'is not UTF-8'),
    'judgements cut off': (QRELS_FILE, packed(qrels(JUDGED*20))[:-200], 'ends too early'),
    # trials
    'field of a trial': (TRIAL_FILE, packed(lines([without(trial(1), 'inclusion_criteria')])),
                         'column inclusion_criteria: it is nowhere'),
    'field that is no text': (TRIAL_FILE, packed(lines([trial(1, brief_title=7)])), 'column brief_title'),
    'trial twice': (TRIAL_FILE, packed(lines([trial(1), trial(1)])), 'NCT00000001 stands there twice'),
    'latin-1 trials': (TRIAL_FILE, packed(lines([trial(1)]).encode() + MENIERE), 'line 2 is not UTF-8'),
    'trials cut off': (TRIAL_FILE, packed(MANY)[:-500], 'ends too early'),
    'not compressed': (TRIAL_FILE, MANY, 'no gzip'),
    'no text at all': (TRIAL_FILE, packed(lines([trial(77)])), 'none of the judged trials'),
    'trials without a word': (TRIAL_FILE, packed(lines(WORDLESS)), 'none of the judged trials'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_bad_files_are_refused_with_place_and_remedy(folder, name):
    file, data, says = REFUSED[name]
    if file == XML_FILE:
        (folder/TOPIC_FILE).unlink()
    (folder/file).write_bytes(data.encode() if isinstance(data, str) else data)
    (folder/'secret.txt').write_text('SECRET')
    (folder/'secret.dtd').write_text('<!ENTITY c "SECRET">')
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TableError) as error:
        trial_questions(folder, SMOKE)
    message = str(error.value)
    assert says in message and file in message
    assert message.endswith('.')
    assert 'SECRET' not in message and 'Traceback' not in message
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize('gone, says', [
    (TOPIC_FILE, 'no topics 2021'), (QRELS_FILE, 'no judgements 2021'), (TRIAL_FILE, 'no trials')])
def test_a_missing_file_is_named(folder, gone, says):
    (folder/gone).unlink()
    with pytest.raises(TableError, match=says):
        trial_files(folder)


def test_two_files_of_one_kind_are_refused(folder):
    (folder/XML_FILE).write_bytes(xml(ONE))
    with pytest.raises(TableError, match='keep one'):
        trial_files(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(TableError, match='no topics 2021'):
        trial_files(tmp_path)


def test_half_a_year_is_refused(folder):
    (folder/'qrels2022.txt').write_text('1 0 NCT00000001 0\n')
    with pytest.raises(TableError, match='no topics 2022'):
        trial_files(folder)


# -- judgements

@pytest.fixture
def rejudged(folder):
    "Questions and counts where one pair is judged three times alike and one in two ways."
    topic_id, nct, score = JUDGED[1]
    more = [JUDGED[0], JUDGED[0], (topic_id, nct, (score + 1) % 3)]
    (folder/QRELS_FILE).write_bytes(packed(qrels(JUDGED + more)))
    return trial_questions(folder, SMOKE)


def test_equal_judgements_count_once_and_conflicting_ones_not_at_all(rejudged):
    questions, _ = rejudged
    assert 'trec-20211/NCT00000000' in set(questions['sample_id'])
    assert 'trec-20211/NCT00000001' not in set(questions['sample_id'])
    assert len(questions) == 99


def test_repeated_and_conflicting_judgements_are_counted(rejudged):
    _, counts = rejudged
    names = ('judgements', 'repeated', 'conflicting', 'pairs', 'without_text')
    assert [counts[name] for name in names] == [123, 2, 2, 119, 20]
    assert sum(with_text for _, _, with_text, _ in counts['by_topic']) == 99
    assert sum(without_text for *_, without_text in counts['by_topic']) == 20


def test_both_years_together(folder):
    second = '<topic number="2">A woman.</topic>'
    (folder/'topics2022.xml').write_bytes(xml(ONE, second, task='2022 TREC Clinical Trials'))
    (folder/'qrels2022.txt').write_text('1  0\tNCT00000001 0\n\n2 0 NCT00000001 2\n')
    pairs, counts = read_trial_pairs(folder)
    of_2022 = pairs.filter(pl.col('topic').str.starts_with('trec-2022'))
    assert counts['topics'] == 12
    assert of_2022.select('topic', 'trial', 'label', 'note').rows() == [
        ('trec-20221', 'NCT00000001', 0, 'A man.'), ('trec-20222', 'NCT00000001', 2, 'A woman.')]


# -- the scale

@pytest.fixture
def asked_folder(folder):
    return trial_questions(folder, SMOKE)[0]


def test_the_scale_is_trecs_from_file_to_question(asked_folder):
    "0 is not relevant, 1 excluded, 2 eligible."
    word = {0: 'Irrelevant', 1: 'Excluded', 2: 'Eligible'}
    golds = dict(asked_folder.select('sample_id', 'gold').rows())
    wanted = {f'{topic_id}/{nct}': [word[score]] for topic_id, nct, score in JUDGED if f'{topic_id}/{nct}' in golds}
    assert golds == wanted
    assert sizes_of_classes(asked_folder).keys() == set(TRIAL_CLASSES)


@pytest.mark.parametrize('word, number, swapped', [
    ('Irrelevant', 0, ('Excluded', 0)),
    ('Excluded', 1, ('Irrelevant', 1)),
    ('Eligible', 2, ('Eligible', 1)),
])
def test_the_scale_is_trecs_in_the_judge(word, number, swapped):
    "EHRMind's own reward has 0 and 1 swapped."
    assert right_class([word], dict(prediction=word, idx=number))
    assert not right_class([word], dict(zip(TRIAL_KEYS, swapped)))


# -- questions

@pytest.fixture
def pieces(folder):
    "Questions whose trials have all pieces, but for the first."
    texts = [trial(number, brief_summary='Sum.', exclusion_criteria='Gout.') for number in range(1, 10)]
    (folder/TRIAL_FILE).write_bytes(packed(lines([trial(0, brief_title=''), *texts])))
    return trial_questions(folder, SMOKE)[0]


HEADS = ['## Trial summary', '## Trial title', '## Exclusion criteria', '## Inclusion criteria', '## Patient']


def test_questions_have_the_schema(pieces):
    assert pieces.schema == QUESTIONS
    assert pieces['sample_id'].is_unique().all()
    assert set(pieces['kind']) == {'decision'}
    assert pieces['group'].to_list() == [sample_id.split('/')[0] for sample_id in pieces['sample_id']]


def test_questions_have_their_pieces(pieces):
    for sample_id, context in pieces.select('sample_id', 'context').iter_rows():
        heads = [piece.partition('\n')[0] for piece in context]
        assert heads == ['## Scale', *(HEADS[3:] if sample_id.endswith('NCT00000000') else HEADS)]
        assert 'asthma of kind' in context[-1]


def test_questions_do_not_tell(pieces):
    (question,) = set(pieces['question'])
    assert [word for word in TRIAL_CLASSES if word in question] == list(TRIAL_CLASSES)
    assert len({context[0] for context in pieces['context']}) == 1


# -- splits

notes = st.sampled_from(['A man', ' a  MAN ', 'A woman', 'A boy', 'A girl', 'An infant'])
criteria = st.sampled_from(['Adults.', 'adults. ', 'Children.', 'Asthma.', 'Gout.'])


@st.composite
def judged_pairs(draw):
    "Some pairs of a few topics and trials, of which some have the same text."
    note_of = draw(st.dictionaries(st.integers(1, 8), notes, min_size=1))
    text_of = draw(st.dictionaries(st.integers(1, 12), criteria, min_size=1))
    pair = st.tuples(st.sampled_from(sorted(note_of)), st.sampled_from(sorted(text_of)))
    rows = draw(st.lists(pair, min_size=1, unique=True))
    common = dict(label=0, title='', summary='', exclusion='')
    return pl.DataFrame([dict(topic=f'trec-2021{number}', trial=f'NCT{nct:08}', note=note_of[number],
                              inclusion=text_of[nct]) | common for number, nct in rows])


def folded_parts(pairs, seed):
    "Part -> (note, criteria) of its pairs, as they are compared."
    parts = split_pairs(pairs, seed).select('part', 'note', 'inclusion').rows()
    return {part: [(folded_text(note), folded_text(text)) for of, note, text in parts if of == part]
            for part in ('train', *TESTS)}


def people(pairs):
    return {note for note, _ in pairs}


few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 3)


@few
@given(judged_pairs(), seeds)
def test_splitting_changes_no_pair(pairs, seed):
    assert split_pairs(pairs, seed).drop('part').equals(pairs)


@few
@given(judged_pairs(), seeds)
def test_no_test_pair_is_in_training(pairs, seed):
    parts = folded_parts(pairs, seed)
    assert not set(parts['train']) & set(parts['transductive'])
    assert not people(parts['train'] + parts['transductive']) & people(parts['inductive'])


@few
@given(judged_pairs(), seeds)
def test_every_known_patient_is_in_training(pairs, seed):
    parts = folded_parts(pairs, seed)
    assert parts['train']
    assert people(parts['transductive']) <= people(parts['train'])


@few
@given(judged_pairs(), seeds)
def test_a_fifth_is_tested(pairs, seed):
    parts = folded_parts(pairs, seed)
    everybody = people(parts['train'] + parts['transductive'] + parts['inductive'])
    known = set(parts['train'] + parts['transductive'])
    assert len(people(parts['inductive'])) == round(.2*len(everybody))
    assert len(set(parts['transductive'])) <= round(.2*len(known))


@few
@given(judged_pairs(), seeds, st.randoms(use_true_random=False))
def test_splits_do_not_depend_on_the_order(pairs, seed, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    parts = split_pairs(pairs, seed)['part']
    assert split_pairs(pairs[order], seed)['part'].to_list() == [parts[row] for row in order]


@pytest.mark.parametrize('most, each', [(0, None), (9, 3), (10_000, None)])
def test_balanced_draws_as_many_of_each_class(asked_folder, most, each):
    train = for_training(asked_folder)
    rarest = min(sizes_of_classes(train).values())
    some = balanced(asked_folder, 1, most)
    assert sizes_of_classes(some) == dict.fromkeys(TRIAL_CLASSES, each or rarest)
    assert set(some['sample_id']) <= set(train['sample_id'])


def test_balanced_does_not_depend_on_the_order(asked_folder):
    shuffled = asked_folder.sample(fraction=1, shuffle=True, seed=5)
    one, other = (balanced(questions, 1, 9).sort('sample_id') for questions in (asked_folder, shuffled))
    assert one.equals(other)


def test_balanced_depends_on_the_seed(asked_folder):
    one, other = (balanced(asked_folder, seed, 9)['sample_id'] for seed in (1, 2))
    assert one.to_list() != other.to_list()


def test_balanced_of_nothing_is_nothing(asked_folder):
    assert len(balanced(held_out(asked_folder), 1)) == 0


# -- answers

odd_texts = st.sampled_from([*TRIAL_CLASSES, 'eligible ', '\tEXCLUDED', '0', ' 1 ', '2', '1.0'])
odd_numbers = st.booleans() | st.integers(-3, 4) | st.just(10**400) | st.floats()
odd_values = st.none() | odd_numbers | st.text(max_size=12) | odd_texts


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(TRIAL_CLASSES), st.dictionaries(st.sampled_from([*TRIAL_KEYS, 'other']), odd_values))
def test_the_judge_has_an_opinion_on_everything(word, answer):
    said, number = answer.get('prediction'), answer.get('idx')
    place = TRIAL_CLASSES.index(word)
    right_word = isinstance(said, str) and said.strip().lower() == word.lower()
    as_text = isinstance(number, str) and number.strip() == str(place)
    right_number = as_text or (not isinstance(number, bool) and number == place)
    assert right_class([word], answer) is (right_word and right_number)


@pytest.mark.parametrize('gold', TRIAL_CLASSES)
@pytest.mark.parametrize('said', TRIAL_CLASSES)
@pytest.mark.parametrize('number', range(3))
def test_each_class_can_be_won_and_lost(gold, said, number):
    text = f'<think>t</think><answer>{json.dumps(dict(prediction=said, idx=number))}</answer>'
    agrees = TRIAL_CLASSES[number] == said
    earned = ehrmind_reward(text, lambda answer: right_class([gold], answer), TRIAL_KEYS)
    assert earned == (1.1 if agrees and said == gold else 0)
    assert read_class(text) == (number if agrees else NO_CLASS)


def test_the_right_answer_is_right():
    assert right_class(['Excluded'], trial_answer(['Excluded']))


def test_a_label_that_no_answer_can_meet_is_an_error():
    with pytest.raises(ValueError):
        right_class(['excluded'], {})


PIECES = [
    '<think>', '</think>', '<answer>', '</answer>', '{"prediction": "Eligible", "idx": 2}',
    '{"idx": 1, "prediction": "Eligible"}', 'Eligible', 'not ', 'Excluded', '\n', '{', '"']
texts = st.lists(st.sampled_from(PIECES), max_size=10).map(''.join) | st.text(max_size=40)


@settings(max_examples=50, deadline=None)
@given(texts)
def test_any_text_is_read(text):
    said = read_class(text)
    assert said in (0, 1, 2, NO_CLASS)
    if '<think>' in text and '</think>' not in text:
        assert said == NO_CLASS


@settings(max_examples=50, deadline=None)
@given(texts)
def test_reading_agrees_with_the_reward(text):
    strict = ehrmind_answer(text, TRIAL_KEYS)
    if strict is not None:
        won = [right_class([word], strict) for word in TRIAL_CLASSES]
        assert won == [place == read_class(text) for place in range(3)]


@pytest.mark.parametrize('text, says', [
    ('Eligible', 2),
    (' irrelevant \n', 0),
    ('<think>a</think>\nExcluded', 1),
    ('x</think><answer>{"prediction": "Excluded", "idx": 1}</answer>', 1),
    ('{"prediction": "excluded", "idx": "1"}', 1),
    ('<answer>Excluded</answer>', NO_CLASS),
    ('{"prediction": "Excluded"}', NO_CLASS),
    ('The patient is not eligible', NO_CLASS),
    ('Eligible.', NO_CLASS),
    ('Excluded\nExcluded', NO_CLASS),
    ('2', NO_CLASS),
    ('<think>a</think><answer>{"prediction": ["Eligible"], "idx": 2}</answer>', NO_CLASS),
    ('{"prediction": "Eligible", "idx": 2}'*2, NO_CLASS),
    ('Eligible or Excluded', NO_CLASS),
    ('', NO_CLASS),
    (None, NO_CLASS),
])
def test_what_counts_as_said(text, says):
    assert read_class(text) == says


# -- metrics

def scikit_metrics(gold, said):
    "The metrics by scikit-learn."
    means = dict(labels=sorted(set(gold)), average='macro', zero_division=0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # answers outside the gold classes, one class only
        return {
            'accuracy': sk.accuracy_score(gold, said),
            'balanced_accuracy': sk.balanced_accuracy_score(gold, said),
            'kappa': sk.cohen_kappa_score(gold, said),
            'macro_precision': sk.precision_score(gold, said, **means),
            'macro_recall': sk.recall_score(gold, said, **means),
            'macro_f1': sk.f1_score(gold, said, **means),
        }


gold_and_said = st.tuples(st.integers(0, 2), st.integers(0, 3))


@settings(max_examples=15, deadline=None)
@given(st.lists(gold_and_said, min_size=1, max_size=40))
def test_metrics_are_those_of_scikit_learn(rows):
    gold, said = zip(*rows)
    mine, theirs = metrics_of(confusion(gold, said)), scikit_metrics(gold, said)
    assert tuple(mine) == METRICS
    if set(gold) == set(said) and len(set(gold)) == 1:  # everything one class: chance agrees too
        assert math.isnan(mine.pop('kappa'))
    for metric, value in mine.items():
        assert value == pytest.approx(theirs[metric], abs=1e-12), metric


TABLE = [[3, 1, 0, 1], [1, 1, 1, 0], [0, 0, 2, 0]]


def test_metrics_by_hand():
    recall = (3/5 + 1/3 + 1)/3
    assert metrics_of(TABLE) == pytest.approx(dict(
        accuracy=.6,
        balanced_accuracy=recall,
        kappa=(.6 - .32)/(1 - .32),
        macro_precision=(3/4 + 1/2 + 2/3)/3,
        macro_recall=recall,
        macro_f1=(6/9 + 2/5 + 4/5)/3))


def test_metrics_of_many_tables_at_once():
    many = metrics_of([TABLE, np.multiply(TABLE, 7), [[0]*4]*3])
    assert many['accuracy'][:2] == pytest.approx([.6, .6])
    assert all(math.isnan(values[2]) for values in many.values())


# -- scores

def asked(*rows):
    "Questions from (topic, test, class)."
    return pl.DataFrame([
        dict(sample_id=str(number), group=topic_id, task=test, split='train' if test == 'train' else 'held_out',
             kind='decision', context=[], question='?', gold=[gold])
        for number, (topic_id, test, gold) in enumerate(rows)], QUESTIONS)


def told(*rows):
    "Answers from (question, text)."
    return pl.DataFrame([dict(sample_id=str(number), text=text, risk=None, status='answered')
                         for number, text in rows], ANSWERS)


@pytest.fixture(scope='module')
def by_hand():
    "(system, test, metric) -> row of the results of two systems; one was asked a single question."
    questions = asked(
        ('a', 'transductive', 'Irrelevant'), ('a', 'transductive', 'Excluded'), ('b', 'transductive', 'Eligible'),
        ('c', 'inductive', 'Eligible'), ('d', 'train', 'Eligible'))
    first = told((0, 'Irrelevant'), (1, 'Eligible'), (2, 'eligible'), (3, 'no idea'))
    results = score_trials(questions, dict(s=first, t=told((2, None))), SMOKE)
    assert results.schema == RESULTS
    return {(row['system'], row['task'], row['metric']): row for row in results.iter_rows(named=True)}


def test_scores_by_hand(by_hand):
    accuracy = by_hand['s', 'transductive', 'accuracy']
    assert accuracy['value'] == pytest.approx(2/3)
    assert (accuracy['samples'], accuracy['groups'], accuracy['missing']) == (3, 2, 0)
    assert (accuracy['low'], accuracy['high']) == (.5, 1)  # topic a: 1 of 2, topic b: 1 of 1
    assert by_hand['s', 'transductive', 'balanced_accuracy']['value'] == pytest.approx(2/3)
    assert by_hand['s', 'transductive', 'macro_precision']['value'] == pytest.approx((1 + 0 + .5)/3)


def test_an_answer_that_cannot_be_used_is_wrong_and_missing(by_hand):
    lost = by_hand['s', 'inductive', 'accuracy']
    assert (lost['value'], lost['missing']) == (0, 1)


def test_one_topic_has_no_interval(by_hand):
    lost = by_hand['s', 'inductive', 'accuracy']
    assert lost['low'] is None
    assert 'one topic' in lost['note'] and 'no pair is Excluded' in lost['note']


def test_both_tests_are_pooled(by_hand):
    overall = by_hand['s', 'overall', 'accuracy']
    assert overall['value'] == .5
    assert 'pooled' in overall['note']


def test_a_system_is_scored_on_what_it_was_asked(by_hand):
    assert by_hand['t', 'transductive', 'accuracy']['samples'] == 1
    assert ('t', 'inductive', 'accuracy') not in by_hand


@pytest.mark.parametrize('rows', [
    [(7, 'Eligible')],
    [(1, 'Eligible')],
    [(0, 'Eligible'), (0, 'Eligible')],
], ids=['unknown', 'training', 'twice'])
def test_answers_that_fit_no_question_are_an_error(rows):
    questions = asked(('a', 'inductive', 'Eligible'), ('a', 'train', 'Eligible'))
    with pytest.raises(ValueError, match='fit no held-out question'):
        score_trials(questions, dict(s=told(*rows)), SMOKE)


@pytest.fixture(scope='module')
def eight_topics():
    "Eight questions about each of eight topics, answers, and their scores."
    questions = asked(*((f't{i//8}', 'inductive', TRIAL_CLASSES[(i*i//3) % 3]) for i in range(64)))
    answers = told(*((i, TRIAL_CLASSES[i*7 % 3]) for i in range(64)))
    return questions, answers, score_trials(questions, dict(s=answers), SMOKE)


def test_scores_do_not_depend_on_order(eight_topics):
    questions, answers, results = eight_topics
    shuffled = answers.sample(fraction=1, shuffle=True, seed=3)
    assert score_trials(questions.reverse(), dict(s=shuffled), SMOKE).equals(results)


def test_intervals_are_over_topics(eight_topics):
    "The same questions twice add no topic, so nothing new is known."
    questions, answers, results = eight_topics
    again = pl.col('sample_id') + 'x'
    questions = pl.concat([questions, questions.with_columns(again)])
    answers = pl.concat([answers, answers.with_columns(again)])
    twice = score_trials(questions, dict(s=answers), SMOKE)
    numbers = ('value', 'low', 'high')
    assert twice.select(numbers).to_numpy() == pytest.approx(results.select(numbers).to_numpy())


# -- baselines

@pytest.mark.parametrize('note, says', [
    ('48 M with HTN', (48, 'M')),
    ('Pt is a 22yo F otherwise well', (22, 'F')),
    ('74M hx of CAD', (74, 'M')),
    ('For 3 days; a 9 year-old girl', (9, 'F')),
    ('70 y/o with COPD. She', (70, 'F')),
    ('A 5-month-old male', (0, 'M')),
    ('64 years of age', (64, '')),
    ('Fever of 101 F for 5 days. He', (101, 'F')),
    ('', (None, '')),
])
def test_age_and_sex_of_a_patient(note, says):
    assert patient_of(note) == says


@pytest.mark.parametrize('criteria, says', [
    ('Ages 18-75', (18, 75, '')),
    ('1. Female aged 18-65 years old inclusive', (18, 65, 'F')),
    ('Men and women aged 45 and older', (45, math.inf, '')),
    ('Age > 18 years at signing', (18, math.inf, '')),
    ('Patients, ≥ 18 and < 80 years of age', (18, 80, '')),
    ('ECOG 0-2\nAge greater than or equal to (≥) 18 years.', (18, math.inf, '')),
    ('Male, age ≥ 50 years. Pain', (50, math.inf, 'M')),
    ('At least 2 years post-menopausal', (0, math.inf, '')),
    ('≥ 6 months to < 11 years of age', (0, 11, '')),
    ('', (0, math.inf, '')),
])
def test_age_and_sex_that_a_trial_asks_for(criteria, says):
    assert admitted(criteria) == says


def test_features_by_hand():
    words = TfidfVectorizer().fit(['asthma', 'gout'])
    fits_not = dict(note='A 20-year-old woman, asthma', title='asthma', summary='',
                    inclusion='Men aged 30 to 40 years', exclusion='')
    fits = dict(note='asthma gout', title='', summary='', inclusion='gout', exclusion='asthma')
    assert pair_features(pl.DataFrame([fits_not, fits]), words) == pytest.approx(np.array([
        [1, 0, 0, 1, 1],
        [0, .5**.5, .5**.5, 0, 0],
    ]))


def test_baselines_answer_what_is_held_out(folder, asked_folder):
    said = trial_baselines(folder, SMOKE, asked_folder)
    assert set(said) == {'majority', 'logistic'}
    for answers in said.values():
        assert answers.schema == ANSWERS
        assert set(answers['sample_id']) == set(held_out(asked_folder)['sample_id'])


def test_majority_says_a_commonest_class(folder, asked_folder):
    (word,) = set(trial_baselines(folder, SMOKE, asked_folder)['majority']['text'])
    sizes = sizes_of_classes(for_training(asked_folder))
    assert sizes[word] == max(sizes.values())


def test_baselines_learn_from_training_pairs_only(folder, asked_folder):
    said = trial_baselines(folder, SMOKE, asked_folder)
    tested = set(held_out(asked_folder)['sample_id'])
    others = [(topic_id, nct, 2 if f'{topic_id}/{nct}' in tested else score) for topic_id, nct, score in JUDGED]
    (folder/QRELS_FILE).write_bytes(packed(qrels(others)))
    changed, _ = trial_questions(folder, SMOKE)
    assert changed['split'].equals(asked_folder['split']) and not changed['gold'].equals(asked_folder['gold'])
    again = trial_baselines(folder, SMOKE, changed)
    assert all(again[system].equals(said[system]) for system in said)


SICK = ('asthma', 'gout', 'psoriasis', 'epilepsy')


def true_class(topic_number, trial_number):
    "Another illness, too young, or eligible."
    if (topic_number - trial_number) % 4:
        return 0
    return 2 if 18 + topic_number >= 20 + 2*(trial_number//4) else 1


def test_logistic_finds_what_there_is_to_find(tmp_path):
    "Kinds of illness as words, an age limit as the criterion: far above the majority."
    topics = [topic(i, f'A {18 + i}-year-old man with {SICK[i % 4]}.') for i in range(1, 41)]
    trials = [trial(j, brief_title=SICK[j % 4],
                    inclusion_criteria=f'{SICK[j % 4]}. Age {20 + 2*(j//4)} years or older.') for j in range(40)]
    judged = [(f'trec-2021{i}', f'NCT{j:08}', true_class(i, j)) for i in range(1, 41) for j in range(40)]
    (tmp_path/TOPIC_FILE).write_text(lines(topics))
    (tmp_path/'trials.jsonl').write_text(lines(trials))
    (tmp_path/'trec_2021_qrels.tsv').write_text(qrels(judged))
    questions, _ = trial_questions(tmp_path, SMOKE)
    results = score_trials(questions, trial_baselines(tmp_path, SMOKE, questions), SMOKE)
    balanced_accuracy = results.filter(pl.col('metric') == 'balanced_accuracy')
    value = {(system, test): number for system, test, number in balanced_accuracy['system', 'task', 'value'].rows()}
    for test in TESTS:
        assert value['majority', test] == pytest.approx(1/3)
        assert value['logistic', test] > .9


def test_one_class_leaves_the_regression_out(folder):
    (folder/QRELS_FILE).write_bytes(packed(qrels((topic_id, nct, 1) for topic_id, nct, _ in JUDGED)))
    questions, _ = trial_questions(folder, SMOKE)
    assert set(trial_baselines(folder, SMOKE, questions)) == {'majority'}


def test_nothing_to_test_leaves_baselines_out(folder):
    (folder/QRELS_FILE).write_bytes(packed(qrels(JUDGED[:1])))
    questions, counts = trial_questions(folder, SMOKE)
    assert counts['train'] == 1
    assert trial_baselines(folder, SMOKE, questions) == {}
    assert len(score_trials(questions, {}, SMOKE)) == 0


# -- as a stage, and its report

def finished(folder, **manifest):
    folder.mkdir(parents=True)
    (folder/'manifest.json').write_text(json.dumps(manifest))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A run with nothing trained that has the benchmark, and one without it."
    root = tmp_path_factory.mktemp('trials')
    (root/'files').mkdir()
    where, everything = written(root/'files'), replace(SMOKE, lm_per_task=0)
    run = Run('r', root)
    assert build_benchmark(run, everything, TRIALS, where)
    assert not build_benchmark(run, everything, TRIALS, where)  # up to date
    for one in (run, Run('bare', root)):
        finished(one.trajectories, counts=dict(access='open', source='synthetic'))
        finished(one.samples, params=dict(seed=42, protocol='strict', style='compact', caps='paper'))
    return SimpleNamespace(root=root, run=run, folder=run.folder/'transfer'/'trials')


def test_the_stage_runs_without_any_model(home):
    names = {path.name for path in home.folder.iterdir()}
    results = pl.read_parquet(home.folder/'results.parquet')
    assert names >= {'questions.parquet', 'results.parquet', 'answers', 'manifest.json'}
    assert set(results['system']) == {'majority', 'logistic'}
    assert set(results['metric']) == set(METRICS)
    assert set(results['task']) == {*TESTS, 'overall'}


def test_the_stage_counts(home):
    counts = read_manifest(home.folder)['counts']
    assert (counts['without_text'], counts['questions']) == (20, 100)
    assert counts['systems'] == ['logistic', 'majority']


TEMPLATE = Path(__file__).resolve().parent.parent/'nbs'/'11_reports'/'11_trials.ipynb'


def add_answers_of_a_model(folder):
    "An invented model that was asked five questions of each test; every fifth answer cannot be used."
    questions = pl.read_parquet(folder/'questions.parquet')
    some = held_out(questions).group_by('task', maintain_order=True).head(5)
    rows = []
    for number, (sample_id, gold) in enumerate(some.select('sample_id', 'gold').rows()):
        in_form = f'<think>t</think><answer>{json.dumps(trial_answer(gold))}</answer>'
        text = in_form if number % 5 else 'no idea'
        rows.append(dict(sample_id=sample_id, text=text, risk=None, status='answered'))
    pl.DataFrame(rows, ANSWERS).write_parquet(folder/'answers'/'adapted.parquet')
    said = {file.stem: pl.read_parquet(file) for file in sorted((folder/'answers').glob('*.parquet'))}
    score_trials(questions, said, SMOKE).write_parquet(folder/'results.parquet')


@pytest.fixture(scope='module')
def report(home):
    "The folder of a report with answers of a model."
    add_answers_of_a_model(home.folder)
    out = home.root/'report'
    out.mkdir()
    run_report(TEMPLATE, out, dict(profile='smoke', run='r', seed=42), home.root)
    return out


def test_report_has_its_tables_and_figures(report):
    wanted = {f'{name}.{kind}' for name in ('trials', 'trials_topics', 'trials_confusion')
              for kind in ('png', 'svg', 'csv')}
    assert wanted <= {path.name for path in report.iterdir()}


def test_report_says_what_was_found(home, report):
    cells = nbformat.read(report/'11_trials.ipynb', 4).cells
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    shown = json.dumps(outputs, ensure_ascii=False)
    assert 'not published here' in shown
    assert 'adapted** gave 2 answers of 10 that cannot be used' in shown
    assert 'On the same questions' in shown
    assert '"stderr"' not in shown and str(home.root) not in shown


def test_report_counts_what_was_answered(report):
    table = pl.read_csv(report/'trials_confusion.csv')
    asked_of = table.group_by('system').agg(pl.col('pairs').sum())
    unusable = table.filter(pl.col('system') == 'adapted', pl.col('answered') == 'none')
    assert asked_of['pairs'].unique().to_list() == [10]
    assert unusable['pairs'].sum() == 2


def test_report_counts_pairs_with_and_without_text(report):
    topics = pl.read_csv(report/'trials_topics.csv')
    assert topics.select(pl.col('with_text', 'without_text').sum()).row(0) == (100, 20)


def test_report_compares_on_the_same_questions(report):
    same = pl.read_csv(report/'trials_shared.csv')
    assert same.filter(pl.col('test') == 'overall')['samples'].to_list() == [10]*3
    assert same['system'].unique(maintain_order=True).to_list() == ['majority', 'logistic', 'adapted']


def test_report_without_answers_says_what_is_missing(home, tmp_path, monkeypatch, capsys):
    "The cells one after the other, without a kernel."
    monkeypatch.setenv('EHR_R1_HOME', str(home.root))
    monkeypatch.chdir(tmp_path)
    shown = []
    names = dict(display=lambda value: shown.append(value.data))
    with matplotlib.rc_context():
        for cell in nbformat.read(TEMPLATE, 4).cells:
            if cell.cell_type == 'code':
                exec(cell.source, names)
            if 'parameters' in cell.metadata.get('tags', []):
                names |= dict(profile='smoke', run='bare', seed=42)
    (said,) = shown
    assert 'EHR_R1_TRIALS' in said and 'qrels2021.txt' in said
    assert 'run: bare' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
