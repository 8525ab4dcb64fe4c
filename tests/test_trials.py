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


def topic(number, text):
    return dict(_id=f'trec-2021{number}', text=text, metadata={})


def trial(number, **other):
    usual = dict(
        nct_id=f'NCT{number:08}',
        brief_title=f'Study {number}',
        brief_summary='',
        exclusion_criteria='',
        inclusion_criteria=f'Asthma of kind {number}. Age 18 years or older.')
    return usual | other


def lines(rows):
    "JSON Lines."
    return ''.join(json.dumps(row) + '\n' for row in rows)


def qrels(rows):
    "Judgements, tab-separated."
    judgements = [f'{topic}\t{nct}\t{score}\n' for topic, nct, score in rows]
    return 'query-id\tcorpus-id\tscore\n' + ''.join(judgements)


def as_bytes(content):
    return content.encode() if isinstance(content, str) else content


def packed(content):
    return gzip.compress(as_bytes(content))


TOPICS = [topic(i, f'A {20 + i}-year-old man with asthma of kind {i} & a cough.') for i in range(1, 11)]
TRIALS_WITH_TEXT = [trial(number) for number in range(10)]
JUDGED = [
    (f'trec-2021{i}', f'NCT{j:08}', (i + j) % 3)
    for i in range(1, 11)
    for j in range(12)]
TOPIC_FILE = 'trec_2021_topics.jsonl'
XML_FILE = 'topics2021.xml'
QRELS_FILE = 'trec_2021_qrels.tsv.gz'
TRIAL_FILE = 'trials.jsonl.gz'


def write_judged(folder, rows):
    (folder/QRELS_FILE).write_bytes(packed(qrels(rows)))


def write_trials(folder, rows):
    (folder/TRIAL_FILE).write_bytes(packed(lines(rows)))


def written(folder):
    "Ten topics, twelve trials of which ten have a text, everything judged."
    (folder/TOPIC_FILE).write_text(lines(TOPICS))
    write_judged(folder, JUDGED)
    write_trials(folder, TRIALS_WITH_TEXT)
    return folder


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path)


@pytest.fixture(scope='module')
def real(shared):
    "The open files, read once."
    folder = shared/'data'/'clinical-trials'
    pairs, pair_counts = read_trial_pairs(folder)
    questions, counts = trial_questions(folder, SMOKE)
    return SimpleNamespace(folder=folder, pairs=pairs, pair_counts=pair_counts, questions=questions, counts=counts)


def held_out(questions):
    return questions.filter(split='held_out')


def for_training(questions):
    return questions.filter(split='train')


def ids_of(questions):
    return set(questions['sample_id'])


def sizes_of_classes(questions):
    return Counter(gold for gold, in questions['gold'])


def sizes_of_labels(pairs):
    "How many pairs are labelled 0, 1 and 2."
    sizes = pairs['label'].value_counts().sort('label')
    return sizes['count'].to_list()


# -- the real files

def test_real_files_have_the_published_counts(real):
    gaps = {name: count for name, count in real.pair_counts.items() if name.startswith('trials_without_')}
    assert gaps['trials_without_exclusion'] == 37
    assert real.pair_counts == gaps | dict(
        judgements=35_832,
        repeated=0,
        conflicting=0,
        topics=75,
        pairs=35_832,
        trials=374)
    assert sizes_of_labels(real.pairs) == [24_243, 6_019, 5_570]


def test_real_pairs_with_text(real):
    there = real.pairs.drop_nulls('inclusion')
    assert sizes_of_labels(there) == [300, 99, 76]
    assert (there['title'] != '').sum() >= 28


def test_real_pairs_with_text_are_asked(real):
    parts = [real.counts[part] for part in ('train', *TESTS)]
    assert len(real.questions) == sum(parts) == 475
    assert real.counts['without_text'] == 35_832 - 475


def test_real_pairs_are_counted_by_topic(real):
    columns = ['topic', 'judged', 'there', 'lost']
    by_topic = pl.DataFrame(real.counts['by_topic'], columns, orient='row')
    assert by_topic['topic'].n_unique() == 75
    assert by_topic['there'].sum() == 475
    assert by_topic['lost'].sum() == 35_357
    by_class = by_topic.group_by('judged').agg(pl.col('there').sum())
    assert dict(by_class.rows()) == dict(Irrelevant=300, Excluded=99, Eligible=76)


@pytest.fixture(scope='module')
def real_sides(real):
    "The real questions with their texts: training, tests."
    sample_id = pl.concat_str('topic', 'trial', separator='/')
    texts = real.pairs.select('note', *FIELDS, sample_id=sample_id)
    questions = real.questions.join(texts, on='sample_id')
    return for_training(questions), held_out(questions)


def test_real_tests_share_no_pair_with_training(real, real_sides):
    train, tests = real_sides
    assert len(train) + len(tests) == len(real.questions)
    assert not ids_of(train) & ids_of(tests)
    texts_of_train = train.select('note', *FIELDS).rows()
    texts_of_tests = tests.select('note', *FIELDS).rows()
    assert not set(texts_of_train) & set(texts_of_tests)


def test_real_inductive_patients_are_new_and_transductive_ones_known(real_sides):
    train, tests = real_sides
    known = set(train['note'])
    notes = {task: set(rows['note']) for (task,), rows in tests.group_by('task')}
    assert set(notes) == set(TESTS)
    assert not known & notes['inductive']
    assert notes['transductive'] <= known


def test_a_fifth_of_the_real_topics_is_new(real):
    topics = real.questions['group'].n_unique()
    new = real.questions.filter(task='inductive')['group'].n_unique()
    assert abs(new - .2*topics) <= .5


def test_real_balanced_draw_is_of_training(real, real_sides):
    _, tests = real_sides
    drawn = balanced(real.questions, 42)
    assert not ids_of(drawn) & ids_of(tests)


@pytest.fixture(scope='module')
def nist(real, tmp_path_factory):
    "The real files in NIST's layout."
    folder = tmp_path_factory.mktemp('nist')
    notes = read_topics(real.folder/TOPIC_FILE, 2021)
    topics = [f'<topic number="{topic_id[9:]}">\n{escape(note)}\n</topic>' for topic_id, note in notes.items()]
    (folder/XML_FILE).write_bytes(xml('\n'.join(topics)))
    with gzip.open(real.folder/QRELS_FILE, 'rt') as file:
        _, *rows = file.read().splitlines()
    judgements = [row.split('\t') for row in rows]
    judged = [f'{topic_id[9:]} 0 {nct} {score}\n' for topic_id, nct, score in judgements]
    (folder/'qrels2021.txt').write_text(''.join(judged))
    shutil.copy(real.folder/TRIAL_FILE, folder)
    return folder


def test_nist_topics_read_the_same(real, nist):
    of_nist = read_topics(nist/XML_FILE, 2021)
    assert of_nist == read_topics(real.folder/TOPIC_FILE, 2021)


def test_nist_pairs_read_the_same(real, nist):
    pairs, counts = read_trial_pairs(nist)
    assert pairs.equals(real.pairs)
    assert counts == real.pair_counts


# -- files that must be refused

ENTITIES = ('<!ENTITY a "aaaaaaaaaa">'
            '<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
            '<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">')
ONE = '<topic number="1">A man.</topic>'


def xml(*topics, task='2021 TREC Clinical Trials', head=''):
    return f'{head}<topics task="{task}">{"".join(topics)}</topics>'.encode()


def with_entities(declared):
    "Topics that use an entity."
    return xml('<topic number="1">&c;</topic>', head=f'<?xml version="1.0"?>\n<!DOCTYPE topics [{declared}]>\n')


def topics_of(*rows):
    return lines(rows).encode()


def judged_and(line, encoding='utf-8'):
    "The judgements with one more line."
    return packed(qrels(JUDGED).encode() + f'{line}\n'.encode(encoding))


def trials_of(*rows):
    return packed(lines(rows))


FIRST = TOPICS[0]
SJOGREN = '{"_id": "trec-20212", "text": "Sjögren"}\n'.encode('latin-1')
LATIN_XML = xml('<topic number="1">A mán.</topic>').decode().encode('latin-1')
MENIERE = json.dumps(trial(2, brief_title='Ménière'), ensure_ascii=False).encode('latin-1')
LATIN_TRIALS = packed(lines([trial(1)]).encode() + MENIERE)
WITHOUT_CRITERIA = trial(1)
del WITHOUT_CRITERIA['inclusion_criteria']
LONG = [trial(number, brief_summary=f'{"x y z "*400}{number}') for number in range(400)]
WORDLESS = [trial(number, brief_title='', inclusion_criteria=' ') for number in range(10)]

# file -> what is wrong -> content, words of the error
REFUSED = {
    TOPIC_FILE: {
        'key of a topic': (b'{"_id": "trec-20211", "note": "A man."}\n', f'{TOPIC_FILE}, column text, row 1'),
        'topic twice': (topics_of(FIRST, FIRST), 'trec-20211 stands there twice'),
        'empty note': (topics_of(FIRST, topic(2, ' \n ')), 'the note of topic trec-20212 is empty'),
        'other year': (b'{"_id": "trec-20221", "text": "A man."}\n', 'not of 2021'),
        'latin-1': (topics_of(FIRST) + SJOGREN, 'line 2 is not UTF-8'),
        'UTF-16': (lines(TOPICS).encode('utf-16'), 'is not UTF-8'),
        'broken JSON': (topics_of(FIRST) + b'{"_id": \n', f'{TOPIC_FILE}, row 2: it is no JSON'),
        'deep JSON': (b'['*200_000 + b'\n', 'it is no JSON'),
        'list for an object': (b'["trec-20211", "A man."]\n', 'no JSON object'),
        'half a surrogate pair': (topics_of(topic(1, 'A \ud800 man')), 'column text, row 1'),
    },
    XML_FILE: {
        'topic twice in XML': (xml(ONE, ONE), 'trec-20211 stands there twice'),
        'empty note in XML': (xml(ONE, '<topic number="2">\n</topic>'), 'the note of topic trec-20212 is empty'),
        'topic without a number': (xml('<topic>A man.</topic>'), 'no topic with a number'),
        'structured topic': (xml('<topic number="1"><age>45</age></topic>'), 'no topic with a number'),
        'other year in XML': (xml(ONE, task='2022 TREC Clinical Trials'), 'it does not say 2021'),
        'latin-1 XML': (LATIN_XML, 'is not UTF-8'),
        'broken XML': (xml(ONE)[:-4], 'it is no XML'),
        'unescaped XML': (xml('<topic number="1">COPD & gout</topic>'), 'it is no XML'),
        'entity bomb': (with_entities(ENTITIES), 'document type'),
        'entity that names a file': (with_entities('<!ENTITY c SYSTEM "secret.txt">'), 'document type'),
        'entities from elsewhere': (with_entities('<!ENTITY % d SYSTEM "secret.dtd"> %d;'), 'document type'),
        'entity that nobody declares': (xml('<topic number="1">&c;</topic>'), 'it is no XML'),
    },
    QRELS_FILE: {
        'column of the judgements': (packed('query-id\tscore\ntrec-20211\t1\n'), 'corpus-id'),
        'topic that is not there': (
            judged_and('trec-202199\tNCT00000001\t1'),
            'row 121: there is no topic trec-202199'),
        'judgement of 3': (judged_and('trec-20211\tNCT00000099\t3'), "column score, row 121: '3'"),
        'judgement without a value': (judged_and('trec-20211\tNCT00000099'), '2 values for 3 columns'),
        'latin-1 judgements': (judged_and('trec-20211\tNCT…\t1', 'cp1252'), 'is not UTF-8'),
        'judgements cut off': (packed(qrels(JUDGED*20))[:-200], 'ends too early'),
    },
    TRIAL_FILE: {
        'field of a trial': (trials_of(WITHOUT_CRITERIA), 'column inclusion_criteria: it is nowhere'),
        'field that is no text': (trials_of(trial(1, brief_title=7)), 'column brief_title'),
        'trial twice': (trials_of(trial(1), trial(1)), 'NCT00000001 stands there twice'),
        'latin-1 trials': (LATIN_TRIALS, 'line 2 is not UTF-8'),
        'trials cut off': (trials_of(*LONG)[:-500], 'ends too early'),
        'not compressed': (lines(LONG), 'no gzip'),
        'no text at all': (trials_of(trial(77)), 'none of the judged trials'),
        'trials without a word': (trials_of(*WORDLESS), 'none of the judged trials'),
    },
}
CASES = [
    pytest.param(file, content, says, id=name)
    for file, cases in REFUSED.items()
    for name, (content, says) in cases.items()]


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('file, content, says', CASES)
def test_bad_files_are_refused_with_place_and_remedy(folder, file, content, says):
    if file == XML_FILE:
        (folder/TOPIC_FILE).unlink()
    (folder/file).write_bytes(as_bytes(content))
    (folder/'secret.txt').write_text('SECRET')
    (folder/'secret.dtd').write_text('<!ENTITY c "SECRET">')
    before = contents_of(folder)
    with pytest.raises(TableError) as error:
        trial_questions(folder, SMOKE)
    message = str(error.value)
    assert says in message
    assert file in message
    assert message.endswith('.')
    assert 'SECRET' not in message
    assert 'Traceback' not in message
    assert contents_of(folder) == before


@pytest.mark.parametrize('gone, says', [
    (TOPIC_FILE, 'no topics 2021'),
    (QRELS_FILE, 'no judgements 2021'),
    (TRIAL_FILE, 'no trials'),
])
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
    first, second, *_ = JUDGED
    topic_id, nct, score = second
    other_way = (topic_id, nct, (score + 1) % 3)
    write_judged(folder, [*JUDGED, first, first, other_way])
    return trial_questions(folder, SMOKE)


def test_equal_judgements_count_once_and_conflicting_ones_not_at_all(rejudged):
    questions, _ = rejudged
    assert 'trec-20211/NCT00000000' in ids_of(questions)
    assert 'trec-20211/NCT00000001' not in ids_of(questions)
    assert len(questions) == 99


def test_repeated_and_conflicting_judgements_are_counted(rejudged):
    _, counts = rejudged
    assert counts['judgements'] == 123
    assert counts['repeated'] == 2
    assert counts['conflicting'] == 2
    assert counts['pairs'] == 119
    assert counts['without_text'] == 20
    *_, with_text, without_text = zip(*counts['by_topic'])
    assert sum(with_text) == 99
    assert sum(without_text) == 20


def test_both_years_together(folder):
    second = '<topic number="2">A woman.</topic>'
    topics = xml(ONE, second, task='2022 TREC Clinical Trials')
    (folder/'topics2022.xml').write_bytes(topics)
    (folder/'qrels2022.txt').write_text('1  0\tNCT00000001 0\n\n2 0 NCT00000001 2\n')
    pairs, counts = read_trial_pairs(folder)
    of_2022 = pairs.filter(pl.col('topic').str.starts_with('trec-2022'))
    assert counts['topics'] == 12
    assert of_2022.select('topic', 'trial', 'label', 'note').rows() == [
        ('trec-20221', 'NCT00000001', 0, 'A man.'),
        ('trec-20222', 'NCT00000001', 2, 'A woman.')]


# -- the scale

@pytest.fixture
def asked_folder(folder):
    return trial_questions(folder, SMOKE)[0]


def test_the_scale_is_trecs_from_file_to_question(asked_folder):
    "0 is not relevant, 1 excluded, 2 eligible."
    word = {0: 'Irrelevant', 1: 'Excluded', 2: 'Eligible'}
    judged = {f'{topic_id}/{nct}': word[score] for topic_id, nct, score in JUDGED}
    for sample_id, gold in asked_folder.select('sample_id', 'gold').rows():
        assert gold == [judged[sample_id]]
    assert sizes_of_classes(asked_folder).keys() == set(TRIAL_CLASSES)


@pytest.mark.parametrize('word, number, swapped', [
    ('Irrelevant', 0, ('Excluded', 0)),
    ('Excluded', 1, ('Irrelevant', 1)),
    ('Eligible', 2, ('Eligible', 1)),
])
def test_the_scale_is_trecs_in_the_judge(word, number, swapped):
    "EHRMind's own reward has 0 and 1 swapped."
    answer = dict(prediction=word, idx=number)
    by_ehrmind = dict(zip(TRIAL_KEYS, swapped))
    assert right_class([word], answer)
    assert not right_class([word], by_ehrmind)


# -- questions

@pytest.fixture
def pieces(folder):
    "Questions whose trials have all pieces, but for the first."
    whole = dict(brief_summary='Sum.', exclusion_criteria='Gout.')
    first = trial(0, brief_title='')
    others = [trial(number, **whole) for number in range(1, 10)]
    write_trials(folder, [first, *others])
    return trial_questions(folder, SMOKE)[0]


HEADS_OF_FIRST = [
    '## Scale',
    '## Inclusion criteria',
    '## Patient']
HEADS = [
    '## Scale',
    '## Trial summary',
    '## Trial title',
    '## Exclusion criteria',
    '## Inclusion criteria',
    '## Patient']


def test_questions_have_the_schema(pieces):
    assert pieces.schema == QUESTIONS
    assert pieces['sample_id'].is_unique().all()
    assert set(pieces['kind']) == {'decision'}
    topics = pieces['sample_id'].str.split('/').list.first()
    assert pieces['group'].to_list() == topics.to_list()


def test_questions_have_their_pieces(pieces):
    for sample_id, context in pieces.select('sample_id', 'context').iter_rows():
        heads = [piece.partition('\n')[0] for piece in context]
        of_first = sample_id.endswith('NCT00000000')
        assert heads == (HEADS_OF_FIRST if of_first else HEADS)
        assert 'asthma of kind' in context[-1]


def test_questions_do_not_tell(pieces):
    (question,) = set(pieces['question'])
    assert all(word in question for word in TRIAL_CLASSES)
    scales = pieces['context'].list.first()
    assert scales.n_unique() == 1


# -- splits

notes = st.sampled_from(['A man', ' a  MAN ', 'A woman', 'A boy', 'A girl', 'An infant'])
criteria = st.sampled_from(['Adults.', 'adults. ', 'Children.', 'Asthma.', 'Gout.'])


@st.composite
def judged_pairs(draw):
    "Some pairs of a few topics and trials, of which some have the same text."
    topics, trials = st.integers(1, 8), st.integers(1, 12)
    note_of = draw(st.dictionaries(topics, notes, min_size=1))
    text_of = draw(st.dictionaries(trials, criteria, min_size=1))
    pair = st.tuples(st.sampled_from(sorted(note_of)), st.sampled_from(sorted(text_of)))
    pairs = draw(st.lists(pair, min_size=1, unique=True))
    rows = []
    for topic_number, trial_number in pairs:
        rows.append(dict(
            topic=f'trec-2021{topic_number}',
            trial=f'NCT{trial_number:08}',
            note=note_of[topic_number],
            inclusion=text_of[trial_number],
            label=0,
            title='',
            summary='',
            exclusion=''))
    return pl.DataFrame(rows)


def folded_parts(pairs, seed):
    "Part -> (note, criteria) of its pairs, as they are compared."
    parts = {part: [] for part in ('train', *TESTS)}
    divided = split_pairs(pairs, seed)
    for part, note, text in divided.select('part', 'note', 'inclusion').rows():
        parts[part].append((folded_text(note), folded_text(text)))
    return parts


def people(pairs):
    return {note for note, _ in pairs}


few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 3)


@few
@given(judged_pairs(), seeds)
def test_splitting_changes_no_pair(pairs, seed):
    divided = split_pairs(pairs, seed)
    assert divided.drop('part').equals(pairs)


@few
@given(judged_pairs(), seeds)
def test_no_test_pair_is_in_training(pairs, seed):
    parts = folded_parts(pairs, seed)
    train, transductive = parts['train'], parts['transductive']
    assert not set(train) & set(transductive)
    assert not people(train + transductive) & people(parts['inductive'])


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
    of_known = parts['train'] + parts['transductive']
    new_people = people(parts['inductive'])
    everybody = people(of_known) | new_people
    assert len(new_people) == round(.2*len(everybody))
    tested = set(parts['transductive'])
    assert len(tested) <= round(.2*len(set(of_known)))


@few
@given(judged_pairs(), seeds, st.randoms(use_true_random=False))
def test_splits_do_not_depend_on_the_order(pairs, seed, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    parts = split_pairs(pairs, seed)['part']
    of_shuffled = split_pairs(pairs[order], seed)['part']
    assert of_shuffled.equals(parts[order])


@pytest.mark.parametrize('most, each', [
    (0, None),
    (9, 3),
    (10_000, None),
])
def test_balanced_draws_as_many_of_each_class(asked_folder, most, each):
    train = for_training(asked_folder)
    rarest = min(sizes_of_classes(train).values())
    some = balanced(asked_folder, 1, most)
    assert sizes_of_classes(some) == dict.fromkeys(TRIAL_CLASSES, each or rarest)
    assert ids_of(some) <= ids_of(train)


def test_balanced_does_not_depend_on_the_order(asked_folder):
    shuffled = asked_folder.sample(fraction=1, shuffle=True, seed=5)
    drawn, of_shuffled = balanced(asked_folder, 1, 9), balanced(shuffled, 1, 9)
    assert drawn.sort('sample_id').equals(of_shuffled.sort('sample_id'))


def test_balanced_depends_on_the_seed(asked_folder):
    first, second = (balanced(asked_folder, seed, 9) for seed in (1, 2))
    assert first['sample_id'].to_list() != second['sample_id'].to_list()


def test_balanced_of_nothing_is_nothing(asked_folder):
    assert len(balanced(held_out(asked_folder), 1)) == 0


# -- answers

classes = st.sampled_from(TRIAL_CLASSES)
keys = st.sampled_from([*TRIAL_KEYS, 'other'])
odd_texts = st.sampled_from(['eligible ', '\tEXCLUDED', '0', ' 1 ', '2', '1.0'])
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 4),
    st.just(10**400),
    st.floats(),
    st.text(max_size=12),
    classes,
    odd_texts)


@settings(max_examples=50, deadline=None)
@given(classes, st.dictionaries(keys, odd_values))
def test_the_judge_has_an_opinion_on_everything(word, answer):
    said, number = answer.get('prediction'), answer.get('idx')
    place = TRIAL_CLASSES.index(word)
    right_word = isinstance(said, str) and said.strip().lower() == word.lower()
    as_text = isinstance(number, str) and number.strip() == str(place)
    as_number = number == place and not isinstance(number, bool)
    right_number = as_text or as_number
    assert right_class([word], answer) is (right_word and right_number)


@pytest.mark.parametrize('gold', TRIAL_CLASSES)
@pytest.mark.parametrize('said', TRIAL_CLASSES)
@pytest.mark.parametrize('number', range(3))
def test_each_class_can_be_won_and_lost(gold, said, number):
    def judge(answer):
        return right_class([gold], answer)

    answer = json.dumps(dict(prediction=said, idx=number))
    text = f'<think>t</think><answer>{answer}</answer>'
    agrees = TRIAL_CLASSES[number] == said
    earned = ehrmind_reward(text, judge, TRIAL_KEYS)
    assert earned == (1.1 if agrees and said == gold else 0)
    assert read_class(text) == (number if agrees else NO_CLASS)


def test_the_right_answer_is_right():
    assert right_class(['Excluded'], trial_answer(['Excluded']))


def test_a_label_that_no_answer_can_meet_is_an_error():
    with pytest.raises(ValueError):
        right_class(['excluded'], {})


PIECES = [
    '<think>', '</think>', '<answer>', '</answer>',
    '{"prediction": "Eligible", "idx": 2}',
    '{"idx": 1, "prediction": "Eligible"}',
    'Eligible', 'not ', 'Excluded',
    '\n', '{', '"']
near_answers = st.lists(st.sampled_from(PIECES), max_size=10).map(''.join)
texts = near_answers | st.text(max_size=40)


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
        said = read_class(text)
        for place, word in enumerate(TRIAL_CLASSES):
            assert right_class([word], strict) is (place == said)


@pytest.mark.parametrize('text, says', [
    ('Eligible', 2),
    (' irrelevant \n', 0),
    ('<think>a</think>\nExcluded', 1),
    ('x</think><answer>{"prediction": "Excluded", "idx": 1}</answer>', 1),
    ('{"prediction": "excluded", "idx": "1"}', 1),
    ('<answer>Excluded</answer>', NO_CLASS),
    ('{"prediction": "Excluded"}', NO_CLASS),
    ('The patient is not eligible', NO_CLASS),
    ('Eligible.', 2),
    ('**Eligible**', 2),
    ('- Excluded', 1),
    ('Answer: Irrelevant', 0),
    ('```json\n{"prediction": "Eligible",\n "idx": 2}\n```', 2),
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
    classes_asked = sorted(set(gold))
    means = dict(labels=classes_asked, average='macro', zero_division=0)
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
    mine = metrics_of(confusion(gold, said))
    theirs = scikit_metrics(gold, said)
    assert tuple(mine) == METRICS
    one_class = len({*gold, *said}) == 1
    if one_class:  # chance agrees too
        assert math.isnan(mine.pop('kappa'))
    for metric, value in mine.items():
        assert value == pytest.approx(theirs[metric], abs=1e-12), metric


TABLE = np.array([
    [3, 1, 0, 1],
    [1, 1, 1, 0],
    [0, 0, 2, 0]])


def test_metrics_by_hand():
    precision = (3/4 + 1/2 + 2/3)/3
    recall = (3/5 + 1/3 + 1)/3
    f1 = (6/9 + 2/5 + 4/5)/3
    assert metrics_of(TABLE) == pytest.approx(dict(
        accuracy=.6,
        balanced_accuracy=recall,
        kappa=(.6 - .32)/(1 - .32),
        macro_precision=precision,
        macro_recall=recall,
        macro_f1=f1))


def test_metrics_of_many_tables_at_once():
    empty = np.zeros_like(TABLE)
    many = metrics_of([TABLE, 7*TABLE, empty])
    assert many['accuracy'][:2] == pytest.approx([.6, .6])
    for values in many.values():
        assert math.isnan(values[2])


# -- scores

def asked(*rows):
    "Questions from (topic, test, class)."
    questions = []
    for number, (topic_id, test, gold) in enumerate(rows):
        questions.append(dict(
            sample_id=str(number),
            group=topic_id,
            task=test,
            split='train' if test == 'train' else 'held_out',
            kind='decision',
            context=[],
            question='?',
            gold=[gold]))
    return pl.DataFrame(questions, QUESTIONS)


def told(*rows):
    "Answers from (question, text)."
    answers = [(str(question), text, None, 'answered') for question, text in rows]
    return pl.DataFrame(answers, ANSWERS, orient='row')


@pytest.fixture(scope='module')
def by_hand():
    "(system, test, metric) -> row of the results of two systems; one was asked a single question."
    questions = asked(
        ('a', 'transductive', 'Irrelevant'),
        ('a', 'transductive', 'Excluded'),
        ('b', 'transductive', 'Eligible'),
        ('c', 'inductive', 'Eligible'),
        ('d', 'train', 'Eligible'))
    first = told(
        (0, 'Irrelevant'),
        (1, 'Eligible'),
        (2, 'eligible'),
        (3, 'no idea'))
    second = told((2, None))
    results = score_trials(questions, dict(s=first, t=second), SMOKE)
    assert results.schema == RESULTS
    return results.rows_by_key(['system', 'task', 'metric'], named=True, include_key=True, unique=True)


def test_scores_by_hand(by_hand):
    accuracy = by_hand['s', 'transductive', 'accuracy']
    assert accuracy['value'] == pytest.approx(2/3)
    assert accuracy['samples'] == 3
    assert accuracy['groups'] == 2
    assert accuracy['missing'] == 0
    assert accuracy['low'] == .5  # topic a: 1 of 2
    assert accuracy['high'] == 1  # topic b: 1 of 1


def test_means_over_classes_by_hand(by_hand):
    recall = by_hand['s', 'transductive', 'balanced_accuracy']
    precision = by_hand['s', 'transductive', 'macro_precision']
    assert recall['value'] == pytest.approx(2/3)
    assert precision['value'] == pytest.approx((1 + 0 + .5)/3)


def test_an_answer_that_cannot_be_used_is_wrong_and_missing(by_hand):
    lost = by_hand['s', 'inductive', 'accuracy']
    assert lost['value'] == 0
    assert lost['missing'] == 1


def test_one_topic_has_no_interval(by_hand):
    lost = by_hand['s', 'inductive', 'accuracy']
    assert lost['low'] is None
    assert 'one topic' in lost['note']
    assert 'no pair is Excluded' in lost['note']


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
    golds = [TRIAL_CLASSES[(i*i//3) % 3] for i in range(64)]
    said = [TRIAL_CLASSES[i*7 % 3] for i in range(64)]
    questions = asked(*((f't{i//8}', 'inductive', gold) for i, gold in enumerate(golds)))
    answers = told(*enumerate(said))
    results = score_trials(questions, dict(s=answers), SMOKE)
    return questions, answers, results


def test_scores_do_not_depend_on_order(eight_topics):
    questions, answers, results = eight_topics
    shuffled = answers.sample(fraction=1, shuffle=True, seed=3)
    again = score_trials(questions.reverse(), dict(s=shuffled), SMOKE)
    assert again.equals(results)


def test_intervals_are_over_topics(eight_topics):
    "The same questions twice add no topic, so nothing new is known."
    def doubled(frame):
        again = frame.with_columns(pl.col('sample_id') + 'x')
        return pl.concat([frame, again])

    questions, answers, results = eight_topics
    twice = score_trials(doubled(questions), dict(s=doubled(answers)), SMOKE)
    for column in ('value', 'low', 'high'):
        assert twice[column].to_list() == pytest.approx(results[column].to_list())


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
    fits_not = dict(
        note='A 20-year-old woman, asthma',
        title='asthma',
        summary='',
        inclusion='Men aged 30 to 40 years',
        exclusion='')
    fits = dict(
        note='asthma gout',
        title='',
        summary='',
        inclusion='gout',
        exclusion='asthma')
    half = .5**.5
    expected = np.array([
        [1, 0, 0, 1, 1],
        [0, half, half, 0, 0]])
    assert pair_features(pl.DataFrame([fits_not, fits]), words) == pytest.approx(expected)


def test_baselines_answer_what_is_held_out(folder, asked_folder):
    said = trial_baselines(folder, SMOKE, asked_folder)
    assert set(said) == {'majority', 'logistic'}
    for answers in said.values():
        assert answers.schema == ANSWERS
        assert ids_of(answers) == ids_of(held_out(asked_folder))


def test_majority_says_a_commonest_class(folder, asked_folder):
    majority = trial_baselines(folder, SMOKE, asked_folder)['majority']
    (word,) = set(majority['text'])
    sizes = sizes_of_classes(for_training(asked_folder))
    assert sizes[word] == max(sizes.values())


def test_baselines_learn_from_training_pairs_only(folder, asked_folder):
    said = trial_baselines(folder, SMOKE, asked_folder)
    tested = ids_of(held_out(asked_folder))
    rejudged = []
    for topic_id, nct, score in JUDGED:
        is_tested = f'{topic_id}/{nct}' in tested
        rejudged.append((topic_id, nct, 2 if is_tested else score))
    write_judged(folder, rejudged)
    changed, _ = trial_questions(folder, SMOKE)
    assert changed['split'].equals(asked_folder['split'])
    assert not changed['gold'].equals(asked_folder['gold'])
    again = trial_baselines(folder, SMOKE, changed)
    for system, answers in said.items():
        assert again[system].equals(answers)


ILLNESSES = ('asthma', 'gout', 'psoriasis', 'epilepsy')


def age_of(topic_number):
    return 18 + topic_number


def least_age(trial_number):
    return 20 + 2*(trial_number//4)


def true_class(topic_number, trial_number):
    "Another illness, too young, or eligible."
    if topic_number % 4 != trial_number % 4:
        return 0
    return 2 if age_of(topic_number) >= least_age(trial_number) else 1


def test_logistic_finds_what_there_is_to_find(tmp_path):
    "Kinds of illness as words, an age limit as the criterion: far above the majority."
    topics, trials, judged = [], [], []
    for i in range(1, 41):
        topics.append(topic(i, f'A {age_of(i)}-year-old man with {ILLNESSES[i % 4]}.'))
    for j in range(40):
        illness = ILLNESSES[j % 4]
        wanted = f'{illness}. Age {least_age(j)} years or older.'
        trials.append(trial(j, brief_title=illness, inclusion_criteria=wanted))
    for i in range(1, 41):
        judged += [(f'trec-2021{i}', f'NCT{j:08}', true_class(i, j)) for j in range(40)]
    (tmp_path/TOPIC_FILE).write_text(lines(topics))
    (tmp_path/'trials.jsonl').write_text(lines(trials))
    (tmp_path/'trec_2021_qrels.tsv').write_text(qrels(judged))
    questions, _ = trial_questions(tmp_path, SMOKE)
    baselines = trial_baselines(tmp_path, SMOKE, questions)
    results = score_trials(questions, baselines, SMOKE).filter(metric='balanced_accuracy')
    for test in TESTS:
        rows = results.filter(task=test).select('system', 'value').rows()
        value = dict(rows)
        assert value['majority'] == pytest.approx(1/3)
        assert value['logistic'] > .9


def test_one_class_leaves_the_regression_out(folder):
    all_excluded = [(topic_id, nct, 1) for topic_id, nct, _ in JUDGED]
    write_judged(folder, all_excluded)
    questions, _ = trial_questions(folder, SMOKE)
    assert set(trial_baselines(folder, SMOKE, questions)) == {'majority'}


def test_nothing_to_test_leaves_baselines_out(folder):
    write_judged(folder, JUDGED[:1])
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
    files = root/'files'
    files.mkdir()
    written(files)
    run, bare = Run('r', root), Run('bare', root)
    everything = replace(SMOKE, other_per_task=0)
    assert build_benchmark(run, everything, TRIALS, files)
    assert not build_benchmark(run, everything, TRIALS, files)  # up to date
    params = dict(seed=42, protocol='strict', style='compact', caps='paper')
    for one in (run, bare):
        finished(one.trajectories, counts=dict(access='open', source='synthetic'))
        finished(one.samples, params=params)
    return SimpleNamespace(root=root, run=run, folder=run.folder/'transfer'/'trials')


def test_the_stage_runs_without_any_model(home):
    for name in ('questions.parquet', 'results.parquet', 'answers', 'manifest.json'):
        assert (home.folder/name).exists()
    results = pl.read_parquet(home.folder/'results.parquet')
    assert set(results['system']) == {'majority', 'logistic'}
    assert set(results['metric']) == set(METRICS)
    assert set(results['task']) == {*TESTS, 'overall'}


def test_the_stage_counts(home):
    counts = read_manifest(home.folder)['counts']
    assert counts['without_text'] == 20
    assert counts['questions'] == 100
    assert counts['systems'] == ['logistic', 'majority']


ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT/'nbs'/'11_reports'/'11_trials.ipynb'


def add_answers_of_a_model(folder):
    "An invented model that was asked five questions of each test; every fifth answer cannot be used."
    questions = pl.read_parquet(folder/'questions.parquet')
    some = held_out(questions).group_by('task', maintain_order=True).head(5)
    texts = []
    for number, gold in enumerate(some['gold']):
        right = json.dumps(trial_answer(gold))
        in_form = f'<think>t</think><answer>{right}</answer>'
        texts.append(in_form if number % 5 else 'no idea')
    adapted = told(*zip(some['sample_id'], texts))
    adapted.write_parquet(folder/'answers'/'adapted.parquet')
    files = sorted((folder/'answers').glob('*.parquet'))
    said = {file.stem: pl.read_parquet(file) for file in files}
    results = score_trials(questions, said, SMOKE)
    results.write_parquet(folder/'results.parquet')


@pytest.fixture(scope='module')
def report(home):
    "The folder of a report with answers of a model."
    add_answers_of_a_model(home.folder)
    out = home.root/'report'
    out.mkdir()
    parameters = dict(profile='smoke', run='r', seed=42)
    run_report(TEMPLATE, out, parameters, home.root)
    return out


def test_report_has_its_tables_and_figures(report):
    for name in ('trials', 'trials_topics', 'trials_confusion'):
        for kind in ('png', 'svg', 'csv'):
            assert (report/f'{name}.{kind}').exists()


def test_report_says_what_was_found(home, report):
    cells = nbformat.read(report/'11_trials.ipynb', 4).cells
    outputs = [cell.get('outputs', []) for cell in cells]
    shown = json.dumps(outputs, ensure_ascii=False)
    assert 'not published here' in shown
    assert 'adapted** gave 2 answers of 10 that cannot be used' in shown
    assert 'On the same questions' in shown
    assert '"stderr"' not in shown
    assert str(home.root) not in shown


def test_report_counts_what_was_answered(report):
    table = pl.read_csv(report/'trials_confusion.csv')
    asked_of = table.group_by('system').agg(pl.col('pairs').sum())
    unusable = table.filter(system='adapted', answered='none')
    assert set(asked_of['pairs']) == {10}
    assert unusable['pairs'].sum() == 2


def test_report_counts_pairs_with_and_without_text(report):
    topics = pl.read_csv(report/'trials_topics.csv')
    assert topics['with_text'].sum() == 100
    assert topics['without_text'].sum() == 20


def test_report_compares_on_the_same_questions(report):
    same = pl.read_csv(report/'trials_shared.csv')
    overall = same.filter(test='overall')
    assert overall['samples'].to_list() == [10]*3
    systems = same['system'].unique(maintain_order=True)
    assert systems.to_list() == ['majority', 'logistic', 'adapted']


def test_report_without_answers_says_what_is_missing(home, tmp_path, monkeypatch, capsys):
    "The cells one after the other, without a kernel."
    monkeypatch.setenv('EHR_R1_HOME', str(home.root))
    monkeypatch.chdir(tmp_path)
    shown = []

    def display(value):
        shown.append(value.data)

    names = dict(display=display)
    with matplotlib.rc_context():
        for cell in nbformat.read(TEMPLATE, 4).cells:
            if cell.cell_type == 'code':
                exec(cell.source, names)
            if 'parameters' in cell.metadata.get('tags', []):
                names |= dict(profile='smoke', run='bare', seed=42)
    (said,) = shown
    assert 'EHR_R1_TRIALS' in said
    assert 'qrels2021.txt' in said
    assert 'run: bare' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
