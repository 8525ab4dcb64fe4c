"Terms of a record: spans point at what they claim, values are the labels, and links are decided the same way every time."
import sys, types
from pathlib import Path
import polars as pl, pytest
from hypothesis import given, settings, strategies as st
from ehr_r1.config import Run
from ehr_r1.profiles import profile
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.data.tables import open_source
from ehr_r1.data.tasks import GROUPS, TASKS, Events, decision_labels
from ehr_r1.data.rrf import write_rrf
from ehr_r1.data.trajectories import ITEM, build_trajectories, scan_store
from ehr_r1.synthesis.entities import ENTITY, entities, link_report, terms_in_use, text_terms, value_terms
from ehr_r1.synthesis.linking import TERM_LINK, core_form, icd_codes, link_terms, names_within
from ehr_r1.synthesis.matching import FOUND, Matcher, QuickUmls, lower_case
from ehr_r1.synthesis.compiling import compile_knowledge
from ehr_r1.synthesis.knowledge import Knowledge
from ehr_r1.synthesis.open_knowledge import open_knowledge
from records import at, row, store

PATIENT = row('patients', cells=['60.0', 'F'])
DECISIONS = [t for t in TASKS.values() if t.family == 'decision' and t.trigger != 'any']

def dictionary(*names): return pl.DataFrame(names, orient='row', schema=dict(cui=pl.String, name=pl.String, preferred=pl.Boolean))
def terms_of(matcher, text): return matcher.find([text])['term'].to_list()

@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    "Tables and store of a small hospital; official protocol, so that admissions hold text."
    folder = tmp_path_factory.mktemp('entities')
    build_hospital(folder/'tables', 40, 7, fmt='csv', workers=1, progress=False)
    source, run = open_source(folder/'tables'), Run('entities', folder)
    build_trajectories(source, run, profile('smoke', protocol='official', workers=1))
    return source, scan_store(run.trajectories).collect()

# values

@pytest.mark.parametrize('task', DECISIONS, ids=lambda t: t.name)
def test_values_are_the_labels(task, hospital):
    rows = hospital[1]
    e, found = Events(rows), value_terms(rows)
    found = found.with_columns(j=e.rows['j'].gather(found['row']), table=rows['table'].cast(pl.String).gather(found['row']))
    mine = found.filter(pl.col('table') == task.trigger, pl.col('column') == task.target)
    mine = mine.unique(['j', 'term'], keep='first', maintain_order=True)
    labels = decision_labels(e, task)
    assert len(labels)
    term = pl.col('term').sort() if task.target in GROUPS else pl.col('term')
    assert mine.group_by('j', maintain_order=True).agg(label=term).equals(labels)

def test_cleaning_lists_and_fallbacks():
    rows = store([PATIENT, row('prescriptions', at(1, 1), 7, {'drug': '  Aspirin ', 'ATC Type': 'nan'}),
                  row('prescriptions', at(1, 2), 7, {'drug': 'None', 'ATC Type': ''}),
                  row('hcpcsevents', at(1, 6), 7), row('drgcodes', None, 7), # never shown
                  row('radiology', at(1, 3), 7, {'exam_name': f'CHEST{ITEM} {ITEM}CT HEAD'}),
                  row('transfers', at(1, 4), 7, {'eventtype': 'discharge', 'careunit': ''}),
                  row('transfers', at(1, 5), 7, {'eventtype': 'admit', 'careunit': 'Medicine'})], 'official')
    found = value_terms(rows)
    assert found.schema == ENTITY and found['cui'].null_count() == found['start'].null_count() == len(found)
    assert [(rows['table'][r], c, t) for r, c, t in found.select('row', 'column', 'term').rows()] == [
        ('prescriptions', 'drug', 'Aspirin'), ('radiology', 'exam_name', 'CHEST'), ('radiology', 'exam_name', 'CT HEAD'),
        ('transfers', 'careunit', 'discharge'), ('transfers', 'careunit', 'Medicine')]

def test_values_with_long_letters():
    "Cells are cut where the separator stands, however many bytes a letter has."
    name = "Friedländer's bacillus \U0001f600 infection"
    rows = store([PATIENT, row('diagnoses_icd', None, 7, {'diagnoses': name, 'CCS Type': 'Pneumonie é'}),
                  row('labevents', at(1, 1), 7, {'item_name': 'ß-HCG'}), row('services', at(1, 2), 7, ['MÉD'])], 'official')
    assert sorted(value_terms(rows)['term']) == sorted([name, 'Pneumonie é', 'ß-HCG', 'MÉD'])

def test_rows_count_from_the_first_row_that_is_given(hospital):
    rows = hospital[1]
    whole, part = value_terms(rows), value_terms(rows[1000:])
    assert part.equals(whole.filter(pl.col('row') >= 1000).with_columns(pl.col('row') - 1000))

def test_no_rows():
    rows = store([PATIENT], 'strict')
    assert value_terms(rows.head(0)).schema == ENTITY
    assert entities(rows, Matcher(dictionary(('C0000001', 'Fever', True)))).equals(pl.DataFrame(schema=ENTITY))

# names in text

NAMES = dictionary(*((f'C{i:07d}', name, True) for i, name in enumerate([
    'Heart failure', 'Congestive heart failure', 'Heart', 'Failure to thrive', 'Na+', 'his', 'T4', '12345', 'Ménière disease',
    'İleus', 'β-blocker', 'NaCl (0.9%)'])))
MATCHER = Matcher(NAMES)
KNOWN = {lower_case(n): c for c, n in NAMES.select('cui', 'name').rows()}

pieces = st.sampled_from(['heart', 'Heart', 'HEART FAILURE', 'congestive', 'failure to thrive', 'failure', 'his', 'T4', '12345',
                          'ménière', 'disease', 'İLEUS', 'İ', 'ẞ', 'ﬁ', 'Σ', 'β-Blocker', 'NaCl (0.9%)', 'é', 'e\u0301', '\u0301',
                          'hearty', 'x', '_', '-', '.', ',', ' ', '  ', '\n', '\n\n', '\t', '\u00a0', '\U0001f600', '\x1c'])
texts = st.one_of(st.lists(pieces, max_size=25).map(''.join), st.text(max_size=60))

@settings(max_examples=400, deadline=None)
@given(texts)
def test_spans_point_at_the_names_they_claim(text):
    found = MATCHER.find([text])
    last = 0
    for _, start, end, term, cui in found.rows():
        assert last <= start < end <= len(text) # in order, none overlaps
        last = end
        said = text[start:end]
        assert ' '.join(said.split()) == term and KNOWN[lower_case(term)] == cui
        assert not (said[0].isalnum() and text[start - 1:start].isalnum()) # whole words
        assert not (said[-1].isalnum() and text[end:end + 1].isalnum())

@settings(max_examples=300, deadline=None)
@given(st.text())
def test_lower_case_moves_nothing(text): assert len(lower_case(text)) == len(text)

@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(
    st.sampled_from(['Heart failure', 'congestive HEART failure', 'heart', 'Ménière disease', 'İleus', 'İLEUS', 'β-BLOCKER']),
    st.sampled_from([', ', '. ', ' İ ', '\n\n', ' and ', ' \U0001f600 '])), max_size=12))
def test_every_place_is_found(parts):
    text, want = '', []
    for name, gap in parts:
        want.append((len(text), len(text) + len(name))); text += name + gap
    assert MATCHER.find([text]).select('start', 'end').rows() == want

def test_the_longest_name_wins_and_others_nearby_stay():
    text = 'Congestive heart failure; heart failure; heart'
    assert terms_of(MATCHER, text) == text.split('; ')
    assert terms_of(MATCHER, 'heart failure to thrive') == ['heart', 'failure to thrive'] # the longer of two that overlap
    crossing = Matcher(dictionary(('C0000001', 'aaa bbb', True), ('C0000002', 'bbb ccc', True)))
    assert terms_of(crossing, 'aaa bbb ccc') == ['aaa bbb'] # as long: the first

def test_word_boundaries():
    assert terms_of(MATCHER, 'hearts heartfailure xheart heart2 2heart heart_ heart-failure') == ['heart', 'heart']
    assert terms_of(MATCHER, 'Na+, Na, Na+K') == [] # two letters
    assert terms_of(MATCHER, 'nacl (0.9%)IV NaCl (0.9 %)') == ['nacl (0.9%)', 'NaCl (0.9 %)']
    assert terms_of(MATCHER, 'me\u0301nie\u0300re disease') == [] # other characters, though they look the same

def test_lines_may_break_inside_a_name_but_paragraphs_part():
    assert terms_of(MATCHER, 'heart\n  failure. Heart\n\nfailure') == ['heart failure', 'Heart']

def test_names_that_mean_nothing_are_left_out():
    assert terms_of(MATCHER, 'his T4 is 12345') == [] and len(MATCHER) == len(NAMES) - 4

def test_one_name_of_several_concepts():
    names = [('C0000009', 'Cold', False), ('C0000008', 'Cold', True), ('C0000007', 'cold', True), ('C0000001', 'cold', False),
             ('C0000001', 'COLD', False)]
    for order in (names, names[::-1]):
        m = Matcher(dictionary(*order).lazy())
        assert m.find(['a cold'])['cui'].to_list() == ['C0000007'] and m.ambiguous == 1
    none_preferred = Matcher(dictionary(*names[:1], *names[3:]))
    assert none_preferred.find(['a cold'])['cui'].to_list() == ['C0000001'] # two uses before one

def test_empty_texts_and_dictionaries():
    assert MATCHER.find(['', None, ' \n\n ']).equals(pl.DataFrame(schema=FOUND)) and MATCHER.find([]).schema == FOUND
    assert Matcher(dictionary()).find(['heart']).equals(pl.DataFrame(schema=FOUND))

def test_many_names_and_words():
    "More words than two bytes can number, so that three are really told apart."
    names = [f'name{i:x} of{i % 977}' for i in range(70_000)]
    m = Matcher(pl.DataFrame(dict(cui=[f'C{i:07d}' for i in range(len(names))], name=names, preferred=True)))
    assert m.find(['; '.join(names[::1009])])['cui'].to_list() == [f'C{i:07d}' for i in range(0, len(names), 1009)]
    assert m.find([' '.join(f'name{i:x} of{(i + 1) % 977}' for i in range(0, 70_000, 7))]).is_empty()

def test_free_text_of_all_tables(hospital):
    rows = hospital[1]
    m = Matcher(dictionary(('C0000001', 'discharge', True), ('C0000002', 'allergies', True), ('C0000003', 'findings', True)))
    found = text_terms(rows, m)
    tables = rows['table'].cast(pl.String).gather(found['row'])
    assert set(zip(tables, found['column'])) == {('discharge', 'text'), ('admissions', 'admission_info'), ('radiology', 'text')}
    texts = rows['cells'].gather(found['row']).str.split('\x1f').list.get(-1)
    assert all(t[s:e] == term for t, s, e, term in zip(texts, found['start'], found['end'], found['term']))
    both = entities(rows, m)
    assert both.schema == ENTITY and both['row'].is_sorted() and len(both) == len(found) + len(value_terms(rows))
    assert found.filter(tables == 'radiology')['cui'].unique().to_list() == ['C0000003']

def test_quickumls_adapter(monkeypatch):
    "Against a stand-in of the documented interface."
    asked = []
    class QuickUMLS:
        def __init__(self, quickumls_fp, overlapping_criteria='score', threshold=.7, window=5, similarity_name='jaccard',
                     min_match_length=3, accepted_semtypes=None, verbose=False, keep_uppercase=False):
            asked.append((quickumls_fp, threshold))
        def match(self, text, best_match=True, ignore_syntax=False):
            assert best_match and not ignore_syntax
            def hit(start, end, cui, similarity, preferred):
                return dict(start=start, end=end, ngram=text[start:end], term='x', cui=cui, similarity=similarity, 
                            semtypes={'T047'}, preferred=preferred)
            same_place = [hit(8, 21, 'C0000003', .9, 1), hit(8, 21, 'C0000002', 1., 0), hit(8, 21, 'C0000001', 1., 0)]
            return [same_place, [hit(0, 7, 'C0000009', .8, 1)]]
    monkeypatch.setitem(sys.modules, 'quickumls', types.SimpleNamespace(QuickUMLS=QuickUMLS))
    found = QuickUmls(Path('made')).find(['Dyspnea heart\nfailure', ''])
    assert asked == [('made', .7)] and found.schema == FOUND
    assert found.rows() == [(0, 0, 7, 'Dyspnea', 'C0000009'), (0, 8, 21, 'heart failure', 'C0000001')]

def test_quickumls_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'quickumls', None)
    with pytest.raises(ImportError, match='pip install quickumls.*Matcher'): QuickUmls('made')

# links

CONCEPTS = [
    ('C0018801', 'Heart failure', True, 'ICD10CM', 'I50'), ('C0018801', 'Cardiac failure', False, 'SNOMEDCT_US', '84114007'),
    ('C0155626', 'Acute myocardial infarction', True, 'ICD9CM', '410'),
    ('C0340293', 'Anterolateral infarction', True, 'ICD9CM', '410.0'),
    ('C0018213', 'Hearing loss', True, 'ICD9CM', '389.3'), ('C0398398', 'Venous catheterization', True, 'ICD9CM', '38.93'),
    ('C0023660', 'Lidocaine', True, 'RXNORM', '6387'), ('C0009443', 'Cold', False, 'X', '1'),
    ('C0009443', 'Common cold', True, 'X', '1'),
    ('C0024117', 'COLD', False, 'X', '2'), ('C0024117', 'COPD', True, 'X', '2'), ('C0009264', 'cold', True, 'X', '3'),
    ('C0011860', 'Type 2 diabetes', True, 'X', '4'), ('C0011847', 'Diabetes', True, 'X', '5'),
    ('C0019159', 'Hepatitis A', True, 'X', '6')]

@pytest.fixture(scope='module')
def knowledge(tmp_path_factory):
    folder = tmp_path_factory.mktemp('knowledge')
    frame = lambda rows, columns: pl.DataFrame(rows, orient='row', schema=columns.split())
    write_rrf(folder/'rrf', frame(CONCEPTS, 'cui name preferred source code'),
              frame([('C0023660', 'may_treat', 'C0018801', 'X')], 'cui1 relation cui2 source'),
              frame([('C0018801', 'T047', 'Disease or Syndrome')], 'cui tui kind'))
    compile_knowledge(folder/'rrf', folder/'knowledge')
    return Knowledge(folder/'knowledge')

def how(knowledge, term, *codes):
    frame = pl.DataFrame([(term, *c) for c in codes], orient='row', schema=dict(term=pl.String, source=pl.String, code=pl.String))
    return link_terms([term], knowledge, frame).select('cui', 'how').row(0)

def test_ways_and_their_order(knowledge):
    assert how(knowledge, 'HEART FAILURE') == ('C0018801', 'exact')
    assert how(knowledge, 'Failure of the heart, unspecified') == ('C0018801', 'normalised')
    assert how(knowledge, 'Pump trouble', ('ICD10CM', 'I50')) == ('C0018801', 'code')
    assert how(knowledge, 'Pump trouble, left', ('ICD10CM', 'I50.22')) == ('C0018801', 'broader code')
    assert how(knowledge, 'Chronic heart failure') == ('C0018801', 'approximate')
    assert how(knowledge, 'Chronic heart failure', ('ICD9CM', '41001')) == ('C0340293', 'broader code') # code before likeness
    assert how(knowledge, 'Heart failure', ('ICD9CM', '41001')) == ('C0018801', 'exact')
    assert how(knowledge, 'Bag') == how(knowledge, '?') == how(knowledge, '') == (None, None)
    assert how(knowledge, 'unspecified', ('ICD10CM', 'I5')) == (None, None)

def test_procedures_are_not_diagnoses_with_the_same_digits(knowledge):
    assert how(knowledge, 'Loss', ('ICD9CM', '3893')) == ('C0018213', 'code')
    assert how(knowledge, 'Line', ('ICD9PCS', '3893')) == ('C0398398', 'code')
    assert how(knowledge, 'Line', ('ICD10PCS', '3893')) == (None, None)

def test_ambiguous_names(knowledge):
    assert how(knowledge, 'COLD') == ('C0024117', 'exact') # the same letters first
    assert how(knowledge, 'cold') == how(knowledge, 'cOLD') == ('C0009264', 'exact') # then the preferred name
    assert how(knowledge, 'the cold') == ('C0009264', 'normalised')

def test_approximate_is_careful(knowledge):
    assert how(knowledge, 'Lidocaine 5% Ointment (Glydo)') == ('C0023660', 'approximate')
    assert how(knowledge, 'Type 2 diabetes without complications') == ('C0011860', 'approximate') # not diabetes
    assert how(knowledge, 'Family history of diabetes') == how(knowledge, 'Allergy to lidocaine') == (None, None)
    assert how(knowledge, 'Hepatitis B') == how(knowledge, 'Hepatitis') == (None, None) # one word apart; a name that says more
    assert how(knowledge, 'Edema without heart failure') == (None, None)

def test_one_row_a_term_in_their_order(knowledge):
    terms = ['Bag', 'Chronic heart failure', 'Cardiac failure', None, 'Bag', 'Failure, cardiac']
    found = link_terms(pl.Series(terms), knowledge)
    assert found.schema == TERM_LINK
    assert found['term'].to_list() == ['Bag', 'Chronic heart failure', 'Cardiac failure', 'Failure, cardiac']
    assert found['name'].to_list() == [None, 'Heart failure', 'Cardiac failure', 'Cardiac failure']
    assert link_terms([], knowledge).schema == TERM_LINK and link_terms(['Bag'], knowledge)['score'].to_list() == [None]
    assert link_terms(terms[::-1], knowledge).sort('term').equals(found.sort('term'))

word = st.sampled_from('aa bb cc dd ee ff'.split())
@settings(max_examples=100, deadline=None)
@given(*(st.lists(st.lists(word, min_size=1, max_size=n).map(' '.join), unique=True, max_size=12) for n in (5, 4)))
def test_held_names_are_those_a_plain_loop_finds(cores, names):
    c, m = names_within(pl.Series(cores, dtype=pl.String), pl.Series(names, dtype=pl.String))
    want = [(i, j) for i, x in enumerate(cores) for j, y in enumerate(names) if set(y.split()) <= set(x.split())]
    assert sorted(zip(c.tolist(), m.tolist())) == want

def test_cores():
    said = {'Pain, not elsewhere classified': 'pain', 'Clonidine 0.1 mg/24 hr (Catapres)': 'clonidine',
            'Vitamin B12': 'b12 vitamin', 'Exposure to asbestos': None, '(see comment)': None}
    assert dict(core_form(pl.DataFrame(dict(term=list(said)))).rows()) == said

def test_report_counts_every_term_once(hospital, knowledge):
    source = hospital[0]
    report = link_report(source, knowledge)
    kinds = report.group_by('kind').agg(pl.col('terms', 'occurrences', 'share_of_terms', 'share_of_occurrences').sum())
    drugs = source.scan('prescriptions', ['drug']).filter(pl.col('drug').is_not_null()).collect()['drug'].str.strip_chars()
    row = kinds.filter(pl.col('kind') == 'drugs').row(0, named=True)
    assert (row['terms'], row['occurrences']) == (drugs.n_unique(), len(drugs))
    for column in ('share_of_terms', 'share_of_occurrences'): assert kinds[column].to_list() == pytest.approx([1]*4)
    named = drugs.filter(drugs.str.to_lowercase().is_in([name.lower() for _, name, *_ in CONCEPTS]))
    exact = report.filter(pl.col('kind') == 'drugs', pl.col('how') == 'exact')
    assert exact.select('terms', 'occurrences').row(0) == (named.n_unique(), len(named))

def test_the_demo_and_the_open_graph(demo, shared, tmp_path):
    open_knowledge(shared/'data'/'knowledge', tmp_path/'rrf'); compile_knowledge(tmp_path/'rrf', tmp_path/'knowledge')
    source, knowledge = open_source(demo), Knowledge(tmp_path/'knowledge')
    used = terms_in_use(source)
    links = link_terms(used['term'], knowledge, icd_codes(source))
    assert set(links['how'].drop_nulls()) == {'exact', 'normalised', 'code', 'broader code', 'approximate'}
    assert all(c in knowledge for c in links['cui'].drop_nulls().unique())
    linked = dict(links.select('term', 'name').rows())
    assert linked['Furosemide'] == 'Furosemide' and linked['Acetaminophen IV'] == 'Acetaminophen' and linked['Bag'] is None
    share = used.join(links, on='term').group_by('kind').agg(pl.col('cui').is_not_null().mean())
    share = dict(share.rows())
    assert share['diagnoses'] > .4 and share['drugs'] > .5 # less if a way were lost

def test_codes_of_titles(hospital):
    codes = icd_codes(hospital[0])
    assert codes.columns == ['term', 'source', 'code'] and not codes['code'].str.contains('.', literal=True).any()
    assert set(codes['source']) == {'ICD9CM', 'ICD10CM', 'ICD9PCS', 'ICD10PCS'}
