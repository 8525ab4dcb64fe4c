"Terms of a record: spans point at what they claim, values are the labels, links are decided the same way every time."
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import at, row, store

from ehr_r1.config import Run
from ehr_r1.data.decisions import decision_labels
from ehr_r1.data.events import ITEM
from ehr_r1.data.rrf import write_rrf
from ehr_r1.data.tables import open_source
from ehr_r1.data.task_events import Events
from ehr_r1.data.tasks import GROUP_TARGETS, TASKS
from ehr_r1.data.trajectories import build_trajectories, scan_trajectories
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile
from ehr_r1.synthesis.compiling import compile_knowledge
from ehr_r1.synthesis.entities import ENTITY, entities, link_report, terms_in_use, text_terms, value_terms
from ehr_r1.synthesis.knowledge import Knowledge
from ehr_r1.synthesis.linking import TERM_LINK, core_form, icd_codes, link_terms, names_within
from ehr_r1.synthesis.matching import FOUND, Matcher, QuickUmls, lower_case
from ehr_r1.synthesis.open_knowledge import open_knowledge

PATIENT = row('patients', cells=['60.0', 'F'])
OF_TABLES = [task for task in TASKS.values() if task.trigger != 'any']
DECISIONS = [task for task in OF_TABLES if task.family == 'decision']


@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    "Tables and store of a small hospital; official protocol, so that admissions hold text."
    folder = tmp_path_factory.mktemp('entities')
    build_hospital(folder/'tables', 40, 7, fmt='csv', workers=1, progress=False)
    source = open_source(folder/'tables')
    run = Run('entities', folder)
    build_trajectories(source, run, profile('smoke', protocol='official', workers=1))
    rows = scan_trajectories(run.trajectories).collect()
    return SimpleNamespace(source=source, rows=rows)


# values

@pytest.mark.parametrize('task', DECISIONS, ids=lambda task: task.name)
def test_values_are_the_labels(task, hospital):
    events = Events(hospital.rows)
    labels = decision_labels(events, task)
    found = value_terms(hospital.rows)
    at_row = found['row']
    tables = hospital.rows['table'].cast(pl.String)
    found = found.with_columns(
        j=events.rows['j'].gather(at_row),
        table=tables.gather(at_row))
    of_task = found.filter(table=task.trigger, column=task.target)
    once = of_task.unique(['j', 'term'], keep='first', maintain_order=True)
    term = pl.col('term')
    label = term.sort() if task.target in GROUP_TARGETS else term
    by_event = once.group_by('j', maintain_order=True).agg(label=label)
    assert len(labels)
    assert by_event.equals(labels)


def values_of(table, *times_and_cells):
    "The values of one patient's rows in a table."
    rows = [row(table, time, 7, cells) for time, cells in times_and_cells]
    found = value_terms(store([PATIENT, *rows], 'official'))
    assert found.schema == ENTITY
    for column in ('cui', 'start', 'end'):
        assert found[column].null_count() == len(found)
    return found.select('column', 'term').rows()


def test_values_are_stripped_and_missing_ones_left_out():
    padded = {'drug': '  Aspirin ', 'ATC Type': 'nan'}
    missing = {'drug': 'None', 'ATC Type': ''}
    found = values_of('prescriptions', (at(1, 1), padded), (at(1, 2), missing))
    assert found == [('drug', 'Aspirin')]


def test_each_examination_is_a_value():
    two = {'exam_name': f'CHEST{ITEM} {ITEM}CT HEAD'}
    found = values_of('radiology', (at(1, 3), two))
    assert found == [('exam_name', 'CHEST'), ('exam_name', 'CT HEAD')]


def test_a_transfer_without_unit_is_known_by_its_type():
    discharge = {'eventtype': 'discharge', 'careunit': ''}
    admission = {'eventtype': 'admit', 'careunit': 'Medicine'}
    found = values_of('transfers', (at(1, 4), discharge), (at(1, 5), admission))
    assert found == [('careunit', 'discharge'), ('careunit', 'Medicine')]


@pytest.mark.parametrize('table, time', [
    ('hcpcsevents', at(1, 6)),
    ('drgcodes', None),
])
def test_tables_that_are_never_shown_have_no_values(table, time):
    assert values_of(table, (time, ())) == []


def test_values_stand_in_the_order_of_the_rows():
    drug = row('prescriptions', at(1, 1), 7, {'drug': 'Aspirin'})
    examination = row('radiology', at(1, 3), 7, {'exam_name': 'CHEST'})
    transfer = row('transfers', at(1, 5), 7, {'careunit': 'Medicine'})
    rows = store([PATIENT, drug, examination, transfer], 'official')
    found = value_terms(rows)
    tables = rows['table'].gather(found['row'])
    assert tables.to_list() == ['prescriptions', 'radiology', 'transfers']


LONG_LETTERS = "Friedländer's bacillus \U0001f600 infection"
DIAGNOSIS = {'diagnoses': LONG_LETTERS, 'CCS Type': 'Pneumonie é'}


@pytest.mark.parametrize('table, time, cells, values', [
    ('diagnoses_icd', None, DIAGNOSIS, {LONG_LETTERS, 'Pneumonie é'}),
    ('labevents', at(1, 1), {'item_name': 'ß-HCG'}, {'ß-HCG'}),
    ('services', at(1, 2), ['MÉD'], {'MÉD'}),
])
def test_cells_are_cut_at_the_separator_however_many_bytes_a_letter_has(table, time, cells, values):
    found = values_of(table, (time, cells))
    assert {term for _, term in found} == values


def test_rows_count_from_the_first_row_that_is_given(hospital):
    of_all = value_terms(hospital.rows)
    of_later = value_terms(hospital.rows[1000:])
    later = of_all.filter(pl.col('row') >= 1000)
    assert of_later.equals(later.with_columns(pl.col('row') - 1000))


def dictionary(*names):
    schema = dict(cui=pl.String, name=pl.String, preferred=pl.Boolean)
    return pl.DataFrame(names, orient='row', schema=schema)


def test_no_rows_have_no_terms():
    rows = store([PATIENT], 'strict')
    fever = Matcher(dictionary(('C0000001', 'Fever', True)))
    assert value_terms(rows.head(0)).schema == ENTITY
    assert entities(rows, fever).equals(pl.DataFrame(schema=ENTITY))


# names in text

MEANINGLESS = ['Na+', 'his', 'T4', '12345']
NAMES = [
    'Heart failure',
    'Congestive heart failure',
    'Heart',
    'Failure to thrive',
    'Ménière disease',
    'İleus',
    'β-blocker',
    'NaCl (0.9%)',
    *MEANINGLESS]
CONCEPTS_OF_NAMES = [(f'C{i:07d}', name, True) for i, name in enumerate(NAMES)]
CUI_OF = {lower_case(name): cui for cui, name, _ in CONCEPTS_OF_NAMES}
MATCHER = Matcher(dictionary(*CONCEPTS_OF_NAMES))


def terms_of(matcher, text):
    return matcher.find([text])['term'].to_list()


def spans_of(matcher, text):
    return matcher.find([text]).select('start', 'end').rows()


HEARTS = ['heart', 'Heart', 'HEART FAILURE', 'congestive', 'failure to thrive', 'failure', 'hearty']
NO_NAMES = ['his', 'T4', '12345', 'x']
LETTERS = ['ménière', 'disease', 'İLEUS', 'İ', 'ẞ', 'ﬁ', 'Σ', 'β-Blocker', 'NaCl (0.9%)']
ACCENTS = ['é', 'e\u0301', '\u0301']
MARKS = ['_', '-', '.', ',', '\U0001f600']
SPACES = [' ', '  ', '\n', '\n\n', '\t', '\u00a0', '\x1c']
PIECES = st.sampled_from([*HEARTS, *NO_NAMES, *LETTERS, *ACCENTS, *MARKS, *SPACES])
JOINED = st.lists(PIECES, max_size=25).map(''.join)
TEXTS = st.one_of(JOINED, st.text(max_size=60))


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_spans_point_at_the_names_they_claim(text):
    last = 0
    for _, start, end, term, cui in MATCHER.find([text]).rows():
        assert last <= start < end <= len(text)  # in order, none overlaps
        last = end
        words = text[start:end].split()
        assert ' '.join(words) == term
        assert CUI_OF[lower_case(term)] == cui


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_only_whole_words_are_found(text):
    def inside_a_word(place):
        "Do letters or digits stand on both sides?"
        before, after = text[place - 1:place], text[place:place + 1]
        return before.isalnum() and after.isalnum()

    for start, end in spans_of(MATCHER, text):
        assert not inside_a_word(start)
        assert not inside_a_word(end)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_lower_case_moves_nothing(text):
    assert len(lower_case(text)) == len(text)


WRITTEN = st.sampled_from([
    'Heart failure', 'congestive HEART failure', 'heart', 'Ménière disease', 'İleus', 'İLEUS', 'β-BLOCKER'])
GAPS = st.sampled_from([', ', '. ', ' İ ', '\n\n', ' and ', ' \U0001f600 '])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WRITTEN, GAPS), max_size=12))
def test_every_place_is_found(parts):
    text, expected = '', []
    for name, gap in parts:
        start = len(text)
        text += name
        expected.append((start, len(text)))
        text += gap
    assert spans_of(MATCHER, text) == expected


def test_the_longest_name_wins_and_others_nearby_stay():
    text = 'Congestive heart failure; heart failure; heart'
    assert terms_of(MATCHER, text) == text.split('; ')


def test_of_two_names_that_overlap_the_longer_is_found():
    assert terms_of(MATCHER, 'heart failure to thrive') == ['heart', 'failure to thrive']


def test_of_two_names_as_long_the_first_is_found():
    crossing = dictionary(
        ('C0000001', 'aaa bbb', True),
        ('C0000002', 'bbb ccc', True))
    assert terms_of(Matcher(crossing), 'aaa bbb ccc') == ['aaa bbb']


@pytest.mark.parametrize('text, terms', [
    ('hearts heartfailure xheart heart2 2heart', []),
    ('heart_ heart-failure', ['heart', 'heart']),  # marks are words
    ('Na+, Na, Na+K', []),  # two letters
    ('nacl (0.9%)IV', ['nacl (0.9%)']),
    ('NaCl (0.9 %)', ['NaCl (0.9 %)']),
    ('me\u0301nie\u0300re disease', []),  # other characters, though they look the same
    ('heart\n  failure. Heart\n\nfailure', ['heart failure', 'Heart']),  # an empty line parts
    ('his T4 is 12345', []),
])
def test_what_is_a_name_in_text(text, terms):
    assert terms_of(MATCHER, text) == terms


def test_names_that_mean_nothing_are_left_out():
    assert len(MATCHER) == len(NAMES) - len(MEANINGLESS)


COLDS = [
    ('C0000009', 'Cold', False),
    ('C0000001', 'cold', False),
    ('C0000001', 'COLD', False),
    ('C0000008', 'Cold', True),
    ('C0000007', 'cold', True)]


@pytest.mark.parametrize('names', [COLDS, COLDS[::-1]])
def test_a_name_of_several_concepts_is_where_it_is_preferred_then_the_smallest_id(names):
    matcher = Matcher(dictionary(*names).lazy())
    found = matcher.find(['a cold'])
    assert found['cui'].to_list() == ['C0000007']
    assert matcher.ambiguous == 1


def test_a_name_preferred_nowhere_is_where_more_sources_use_it():
    matcher = Matcher(dictionary(*COLDS[:3]))
    found = matcher.find(['a cold'])
    assert found['cui'].to_list() == ['C0000001']


@pytest.mark.parametrize('matcher, texts', [
    (MATCHER, ['', None, ' \n\n ']),
    (MATCHER, []),
    (Matcher(dictionary()), ['heart']),
])
def test_nothing_is_found_in_empty_texts_or_with_an_empty_dictionary(matcher, texts):
    assert matcher.find(texts).equals(pl.DataFrame(schema=FOUND))


def test_more_words_than_two_bytes_can_number_are_told_apart():
    def name(first, second):
        return f'name{first:x} of{second % 977}'

    names = [name(i, i) for i in range(70_000)]
    cuis = [f'C{i:07d}' for i in range(70_000)]
    matcher = Matcher(pl.DataFrame(dict(cui=cuis, name=names, preferred=True)))
    some = '; '.join(names[::1009])
    mixed = ' '.join(name(i, i + 1) for i in range(0, 70_000, 7))
    found = matcher.find([some])
    assert found['cui'].to_list() == cuis[::1009]
    assert matcher.find([mixed]).is_empty()


@pytest.fixture(scope='module')
def texts(hospital):
    "Names found in the hospital's free text, with the text and the table of each."
    matcher = Matcher(dictionary(
        ('C0000001', 'discharge', True),
        ('C0000002', 'allergies', True),
        ('C0000003', 'findings', True)))
    found = text_terms(hospital.rows, matcher)
    at_row = hospital.rows[found['row']]
    cells = at_row['cells'].str.split('\x1f')
    found = found.with_columns(
        table=at_row['table'].cast(pl.String),
        text=cells.list.get(-1))
    return SimpleNamespace(matcher=matcher, found=found)


def test_free_text_stands_in_three_tables(texts):
    columns = texts.found.select('table', 'column').rows()
    assert set(columns) == {
        ('discharge', 'text'),
        ('admissions', 'admission_info'),
        ('radiology', 'text')}


def test_spans_count_characters_of_the_cell(texts):
    places = texts.found.select('text', 'start', 'end', 'term')
    for text, start, end, term in places.iter_rows():
        assert text[start:end] == term


def test_names_of_a_table_are_those_its_notes_have(texts):
    of_radiology = texts.found.filter(table='radiology')
    assert set(of_radiology['cui']) == {'C0000003'}


def test_entities_are_values_and_names_by_row(hospital, texts):
    both = entities(hospital.rows, texts.matcher)
    values = value_terms(hospital.rows)
    assert both.schema == ENTITY
    assert both['row'].is_sorted()
    assert len(both) == len(texts.found) + len(values)


class StandIn:
    "The documented interface of QuickUMLS."
    asked = []

    def __init__(
        self,
        quickumls_fp,
        overlapping_criteria='score',
        threshold=.7,
        window=5,
        similarity_name='jaccard',
        min_match_length=3,
        accepted_semtypes=None,
        verbose=False,
        keep_uppercase=False,
    ):
        self.asked.append((quickumls_fp, threshold))

    def match(self, text, best_match=True, ignore_syntax=False):
        assert best_match and not ignore_syntax

        def hit(start, end, cui, similarity, preferred):
            return dict(
                start=start,
                end=end,
                ngram=text[start:end],
                term='x',
                cui=cui,
                similarity=similarity,
                semtypes={'T047'},
                preferred=preferred)

        first_place = [hit(0, 7, 'C0000009', .8, 1)]
        second_place = [
            hit(8, 21, 'C0000003', .9, 1),
            hit(8, 21, 'C0000002', 1., 0),
            hit(8, 21, 'C0000001', 1., 0)]
        return [second_place, first_place]


def test_quickumls_is_asked_as_documented_and_its_best_candidates_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, 'quickumls', SimpleNamespace(QuickUMLS=StandIn))
    matcher = QuickUmls(Path('made'))
    found = matcher.find(['Dyspnea heart\nfailure', ''])
    assert StandIn.asked == [('made', .7)]
    assert found.schema == FOUND
    assert found.rows() == [
        (0, 0, 7, 'Dyspnea', 'C0000009'),
        (0, 8, 21, 'heart failure', 'C0000001')]


def test_quickumls_that_is_missing_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, 'quickumls', None)
    with pytest.raises(ImportError, match='pip install quickumls.*Matcher'):
        QuickUmls('made')


# links

HEART_FAILURE, LIDOCAINE = 'C0018801', 'C0023660'
COLD, COPD, COMMON_COLD = 'C0009264', 'C0024117', 'C0009443'
CONCEPTS = [
    (HEART_FAILURE, 'Heart failure', True, 'ICD10CM', 'I50'),
    (HEART_FAILURE, 'Cardiac failure', False, 'SNOMEDCT_US', '84114007'),
    ('C0155626', 'Acute myocardial infarction', True, 'ICD9CM', '410'),
    ('C0340293', 'Anterolateral infarction', True, 'ICD9CM', '410.0'),
    ('C0018213', 'Hearing loss', True, 'ICD9CM', '389.3'),
    ('C0398398', 'Venous catheterization', True, 'ICD9CM', '38.93'),
    (LIDOCAINE, 'Lidocaine', True, 'RXNORM', '6387'),
    (COMMON_COLD, 'Cold', False, 'X', '1'),
    (COMMON_COLD, 'Common cold', True, 'X', '1'),
    (COPD, 'COLD', False, 'X', '2'),
    (COPD, 'COPD', True, 'X', '2'),
    (COLD, 'cold', True, 'X', '3'),
    ('C0011860', 'Type 2 diabetes', True, 'X', '4'),
    ('C0011847', 'Diabetes', True, 'X', '5'),
    ('C0019159', 'Hepatitis A', True, 'X', '6')]


@pytest.fixture(scope='module')
def knowledge(tmp_path_factory):
    def frame(rows, columns):
        return pl.DataFrame(rows, orient='row', schema=columns.split())

    folder = tmp_path_factory.mktemp('knowledge')
    names = frame(CONCEPTS, 'cui name preferred source code')
    relations = frame([(LIDOCAINE, 'may_treat', HEART_FAILURE, 'X')], 'cui1 relation cui2 source')
    kinds = frame([(HEART_FAILURE, 'T047', 'Disease or Syndrome')], 'cui tui kind')
    write_rrf(folder/'rrf', names, relations, kinds)
    compile_knowledge(folder/'rrf', folder/'knowledge')
    return Knowledge(folder/'knowledge')


NOT_LINKED = (None, None)


def how_linked(knowledge, term, source=None, code=None):
    "The concept of a term that is perhaps the title of a code, and how it was found."
    codes = None
    if source:
        codes = pl.DataFrame(dict(term=term, source=source, code=code))
    links = link_terms([term], knowledge, codes)
    return links.select('cui', 'how').row(0)


@pytest.mark.parametrize('term, cui, how', [
    ('HEART FAILURE', HEART_FAILURE, 'exact'),
    ('Failure of the heart, unspecified', HEART_FAILURE, 'normalised'),
    ('Chronic heart failure', HEART_FAILURE, 'approximate'),
    ('COLD', COPD, 'exact'),  # the same letters first
    ('cold', COLD, 'exact'),  # then the preferred name
    ('cOLD', COLD, 'exact'),
    ('the cold', COLD, 'normalised'),
    ('Lidocaine 5% Ointment (Glydo)', LIDOCAINE, 'approximate'),
    ('Type 2 diabetes without complications', 'C0011860', 'approximate'),  # not diabetes
])
def test_ways_to_link_a_name(knowledge, term, cui, how):
    assert how_linked(knowledge, term) == (cui, how)


@pytest.mark.parametrize('term', [
    'Bag',
    '?',
    '',
    'Family history of diabetes',
    'Allergy to lidocaine',
    'Hepatitis B',  # one word apart
    'Hepatitis',    # the name says more
    'Edema without heart failure',
])
def test_terms_that_no_name_stands_for(knowledge, term):
    assert how_linked(knowledge, term) == NOT_LINKED


@pytest.mark.parametrize('term, source, code, linked', [
    ('Pump trouble', 'ICD10CM', 'I50', (HEART_FAILURE, 'code')),
    ('Pump trouble, left', 'ICD10CM', 'I50.22', (HEART_FAILURE, 'broader code')),
    ('Chronic heart failure', 'ICD9CM', '41001', ('C0340293', 'broader code')),  # code before likeness
    ('Heart failure', 'ICD9CM', '41001', (HEART_FAILURE, 'exact')),  # name before code
    ('unspecified', 'ICD10CM', 'I5', NOT_LINKED),
    ('Loss', 'ICD9CM', '3893', ('C0018213', 'code')),
    ('Line', 'ICD9PCS', '3893', ('C0398398', 'code')),  # a procedure with the same digits
    ('Line', 'ICD10PCS', '3893', NOT_LINKED),
])
def test_ways_to_link_a_code(knowledge, term, source, code, linked):
    assert how_linked(knowledge, term, source, code) == linked


TERMS = ['Bag', 'Chronic heart failure', 'Cardiac failure', None, 'Bag', 'Failure, cardiac']


def test_each_term_has_one_row_in_their_order(knowledge):
    found = link_terms(pl.Series(TERMS), knowledge)
    assert found.schema == TERM_LINK
    assert found.select('term', 'name').rows() == [
        ('Bag', None),
        ('Chronic heart failure', 'Heart failure'),
        ('Cardiac failure', 'Cardiac failure'),
        ('Failure, cardiac', 'Cardiac failure')]


def test_the_order_of_terms_changes_no_link(knowledge):
    found = link_terms(TERMS, knowledge)
    turned = link_terms(TERMS[::-1], knowledge)
    assert turned.sort('term').equals(found.sort('term'))


def test_no_terms_have_no_links(knowledge):
    found = link_terms([], knowledge)
    assert found.schema == TERM_LINK
    assert found.is_empty()


def test_no_codes_give_no_links(knowledge):
    columns = ('term', 'source', 'code')
    no_codes = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
    found = link_terms(['Bag'], knowledge, no_codes)
    assert found['score'].to_list() == [None]


WORDS = st.sampled_from('aa bb cc dd ee ff'.split())


def word_sets(most):
    "Different normal forms of up to so many words."
    form = st.lists(WORDS, min_size=1, max_size=most).map(' '.join)
    return st.lists(form, unique=True, max_size=12)


@settings(max_examples=100, deadline=None)
@given(word_sets(5), word_sets(4))
def test_names_within_cores_are_those_a_plain_loop_finds(cores, names):
    in_cores, in_names = names_within(
        pl.Series(cores, dtype=pl.String),
        pl.Series(names, dtype=pl.String))
    found = zip(in_cores.tolist(), in_names.tolist())
    expected = []
    for i, core in enumerate(cores):
        for j, name in enumerate(names):
            if set(name.split()) <= set(core.split()):
                expected.append((i, j))
    assert sorted(found) == expected


@pytest.mark.parametrize('term, core', [
    ('Pain, not elsewhere classified', 'pain'),
    ('Clonidine 0.1 mg/24 hr (Catapres)', 'clonidine'),
    ('Vitamin B12', 'b12 vitamin'),
    ('Exposure to asbestos', None),
    ('(see comment)', None),
])
def test_the_core_of_a_term(term, core):
    terms = pl.DataFrame(dict(term=[term]))
    assert core_form(terms).row(0) == (term, core)


# a whole data set

@pytest.fixture(scope='module')
def report(hospital, knowledge):
    return link_report(hospital.source, knowledge)


@pytest.fixture(scope='module')
def drugs(hospital):
    "Every prescribed drug, as often as it is."
    rows = hospital.source.scan('prescriptions', ['drug']).collect()
    return rows['drug'].drop_nulls().str.strip_chars()


def test_the_report_counts_every_term_once(report, drugs):
    of_drugs = report.filter(kind='drugs')
    assert of_drugs['terms'].sum() == drugs.n_unique()
    assert of_drugs['occurrences'].sum() == len(drugs)


@pytest.mark.parametrize('column', ['share_of_terms', 'share_of_occurrences'])
def test_shares_of_a_kind_are_one_together(report, column):
    by_kind = report.group_by('kind').agg(pl.col(column).sum())
    assert by_kind[column].to_list() == pytest.approx([1]*4)


def test_the_report_says_how(report, drugs):
    names = [name.lower() for _, name, *_ in CONCEPTS]
    is_name = drugs.str.to_lowercase().is_in(names)
    named = drugs.filter(is_name)
    exact = report.filter(kind='drugs', how='exact').row(0, named=True)
    assert exact['terms'] == named.n_unique()
    assert exact['occurrences'] == len(named)


def test_codes_of_titles_have_no_dot_and_four_systems(hospital):
    codes = icd_codes(hospital.source)
    assert codes.columns == ['term', 'source', 'code']
    with_dot = codes['code'].str.contains('.', literal=True)
    assert not with_dot.any()
    assert set(codes['source']) == {'ICD9CM', 'ICD10CM', 'ICD9PCS', 'ICD10PCS'}


@pytest.fixture(scope='module')
def demo_links(demo, shared, tmp_path_factory):
    "Terms of the MIMIC-IV demo, linked to the open graph."
    folder = tmp_path_factory.mktemp('open')
    open_knowledge(shared/'data'/'knowledge', folder/'rrf')
    compile_knowledge(folder/'rrf', folder/'knowledge')
    source, knowledge = open_source(demo), Knowledge(folder/'knowledge')
    used = terms_in_use(source)
    links = link_terms(used['term'], knowledge, icd_codes(source))
    return SimpleNamespace(knowledge=knowledge, used=used, links=links)


def test_every_way_links_terms_of_the_demo(demo_links):
    ways = set(demo_links.links['how'].drop_nulls())
    assert ways == {'exact', 'normalised', 'code', 'broader code', 'approximate'}


def test_links_of_the_demo_lead_to_concepts_that_are_there(demo_links):
    linked = set(demo_links.links['cui'].drop_nulls())
    assert all(cui in demo_links.knowledge for cui in linked)


@pytest.mark.parametrize('term, name', [
    ('Furosemide', 'Furosemide'),
    ('Acetaminophen IV', 'Acetaminophen'),
    ('Bag', None),
])
def test_drugs_of_the_demo_are_linked_to(demo_links, term, name):
    link = demo_links.links.filter(term=term)
    assert link['name'].to_list() == [name]


@pytest.mark.parametrize('kind, least', [
    ('diagnoses', .4),  # less if a way were lost
    ('drugs', .5),
])
def test_share_of_the_demo_that_is_linked(demo_links, kind, least):
    used = demo_links.used.filter(kind=kind)
    links = used.join(demo_links.links, on='term')
    assert links['cui'].is_not_null().mean() > least
