"""Rating sheets: blinded, safe to open with any text, read back whole or not at all; agreement by hand."""
import base64
import csv
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
from statistics import mean

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_r1.foreign_text import visible
from ehr_r1.synthesis.agreement import RATING, agreement, read_ratings
from ehr_r1.synthesis.rating import RATED, RATING_QUESTIONS, blinded, rating_page, rating_sheet

HOSTILE = ('</script><script>alert(1)</script><img src=x onerror="alert(1)"> \'q\' &amp; <!-- ]]> '
           '\x00\x1b\u202e {digest} ${x}\r\nnext "line"\n')
SEEN = visible(HOSTILE)
SYSTEMS = ('secret-graph', 'secret-plain', 'secret-third')

def make(n=6, systems=SYSTEMS, **text):
    "Cases to rate: n samples with a chain of each system; text replaces columns."
    rows = []
    for i in range(n):
        sample = dict(sample_id=f'77700{i}-emar-3', task='emar', record=f'record {i}')
        case = sample | dict(answer='Heparin', chain=f'chain {i}')
        rows += [case | dict(system=system) | text for system in systems]
    columns = ['sample_id', 'system', 'task', 'record', 'answer', 'chain']
    return pl.DataFrame(rows).select(columns)

class Page(html.parser.HTMLParser):
    "Refuses a page whose tags are not balanced; keeps elements with their attributes and own text."
    VOID = {'meta', 'input'}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), '']
        assert len(attrs) == len(element[1]), f'an attribute twice in {tag}'
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2] += data
        else:
            assert not data.strip()

    def handle_comment(self, data):
        raise AssertionError(f'a comment: {data}')

    def unknown_decl(self, data):
        raise AssertionError(f'a declaration: {data}')

    def all(self, tag):
        return [element for element in self.elements if element[0] == tag]

def texts(page):
    "The texts of a page that come from the cases."
    return [text for _, attributes, text in page.all('div') if 'text' in attributes.get('class', '').split()]

# ---- the sheet

def test_letters_hide_the_systems(tmp_path):
    rating_sheet(make(40), tmp_path, 3)
    files = {path.name: path.read_text() for path in (tmp_path/'sheet').iterdir()}
    assert set(files) == {'rating.html', 'ratings.csv'}
    for text in files.values():
        assert not re.search('secret|77700', text)

def test_every_system_is_behind_every_letter(tmp_path):
    key = rating_sheet(make(40), tmp_path, 3)
    behind = key.group_by('system', 'chain').len()
    assert len(behind) == 9
    assert behind['len'].min() >= 5

def test_cases_are_numbered_in_a_drawn_order(tmp_path):
    cases = make(40)
    key = rating_sheet(cases, tmp_path, 3)
    assert key['case'].unique().sort().to_list() == list(range(1, 41))
    first = key.unique('case', maintain_order=True)['sample_id'].to_list()
    assert sorted(first) != first
    assert set(key['sample_id']) == set(cases['sample_id'])

def test_seed_alone_decides_the_order():
    cases = make()
    shuffled = cases.sample(fraction=1, shuffle=True, seed=9)
    whole = blinded(cases, 1)
    assert whole.equals(blinded(shuffled, 1))
    assert not whole.equals(blinded(cases, 2))

def test_without_one_system_the_others_keep_their_order():
    cases = make()
    others = pl.col('system') != SYSTEMS[1]
    kept = blinded(cases.filter(others), 1)
    whole = blinded(cases, 1).filter(others)
    assert kept['system'].to_list() == whole['system'].to_list()

def test_seed_alone_decides_the_files(tmp_path):
    cases = make()
    rating_sheet(cases, tmp_path/'x', 1)
    rating_sheet(cases, tmp_path/'y', 1)
    for name in ('sheet/rating.html', 'sheet/ratings.csv', 'key.csv'):
        assert (tmp_path/'x'/name).read_bytes() == (tmp_path/'y'/name).read_bytes()

def test_digest_names_what_raters_see(tmp_path):
    def digest(cases, seed=1):
        return rating_sheet(cases, tmp_path, seed)['sheet'][0]

    one = digest(make())
    assert one == digest(make())
    others = {digest(make(), 2), digest(make(record='other')), digest(make(5))}
    assert len({one, *others}) == 4

def test_any_text_stays_text():
    cases = make(2, task=HOSTILE, record=HOSTILE, answer=HOSTILE, chain=HOSTILE)
    tree = Page(rating_page(blinded(cases), 'abc'))
    found = texts(tree)
    assert len(found) == 2*(2 + 3)
    assert set(found) == {SEEN}
    counts = {tag: len(tree.all(tag)) for tag in ('script', 'img', 'link', 'a', 'input')}
    assert counts == dict(script=1, img=0, link=0, a=0, input=1 + 2*3*len(RATING_QUESTIONS)*5)

def test_any_text_brings_no_attribute_that_acts():
    cases = make(2, task=HOSTILE, record=HOSTILE, answer=HOSTILE, chain=HOSTILE)
    tree = Page(rating_page(blinded(cases), 'abc'))
    for tag, attributes, _ in tree.elements:
        assert not {'src', 'href', 'style', 'action'} & set(attributes), tag
        assert not [name for name in attributes if name.startswith('on')], tag

ANY_TEXT = st.text(st.characters(exclude_categories=['Cs', 'Cc']), max_size=60)
TRICKY_TEXT = st.text(st.sampled_from('<>&"\'/!-={}$\\ab;#x1\n '), max_size=40)

@settings(max_examples=100, deadline=None)
@given(ANY_TEXT, TRICKY_TEXT)
def test_texts_come_back_as_they_were(any_text, tricky):
    cases = make(1, record=any_text, chain=tricky)
    answer, record, *chains = texts(Page(rating_page(blinded(cases), 'abc')))
    seen = visible(any_text)
    assert answer == 'Heparin'
    assert record == seen
    assert chains == [tricky]*3

def content_policy(tree):
    "What a page allows itself."
    for _, attributes, _ in tree.all('meta'):
        if attributes.get('http-equiv') == 'Content-Security-Policy':
            return attributes['content']
    raise AssertionError('no policy')

def test_page_allows_its_own_script_and_style_alone():
    tree = Page(rating_page(blinded(make()), 'abc'))
    policy = content_policy(tree)
    for tag in ('script', 'style'):
        text = tree.all(tag)[0][2]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert 'unsafe' not in policy

def test_page_loads_and_sends_nothing():
    page = rating_page(blinded(make()), 'abc')
    outward = r'https?:|//[a-z]|fetch\(|XMLHttpRequest|sendBeacon|innerHTML|document\.write|eval\('
    assert not re.search(outward, page)

def first_again(cases):
    return pl.concat([cases, cases.head(1)])

def other_record_for_each_system(cases):
    return cases.with_columns(record=pl.lit('r') + pl.col('system'))

def many_systems(cases):
    return make(1, [f's{i}' for i in range(27)])

def without_chains(cases):
    return cases.drop('chain')

def answers_in_lists(cases):
    return cases.with_columns(answer=pl.concat_list('answer'))

def empty_records(cases):
    return cases.with_columns(record=pl.lit(None, pl.String))

def no_cases(cases):
    return cases.head(0)

BAD_CASES = [
    (without_chains, "no column 'chain'"),
    (answers_in_lists, "column 'answer' is List"),
    (empty_records, "column 'record' has empty"),
    (no_cases, 'none to rate'),
    (first_again, "'777000-emar-3' has two chains of system 'secret-graph'"),
    (other_record_for_each_system, "'777000-emar-3' has different values of 'record'"),
    (many_systems, 'more than 26')]

@pytest.mark.parametrize('change, message', BAD_CASES)
def test_bad_cases_are_named(change, message, tmp_path):
    cases = change(make(2))
    with pytest.raises(ValueError, match=re.escape(message)):
        rating_sheet(cases, tmp_path)
    assert not list(tmp_path.iterdir())

# ---- reading

def given_rating(chain, question):
    "What our raters give: another number to each question of a chain, from 1 to 5."
    return 1 + (chain + question) % 5

def unchanged(rows):
    return rows

@pytest.fixture
def sheet(tmp_path):
    "The key of a sheet, and a function that writes a filled CSV."
    rating_sheet(make(3), tmp_path, 1)
    form = (tmp_path/'sheet'/'ratings.csv').read_text()
    header, *empty = csv.reader(form.splitlines())

    def fill(name='eve.csv', rater='Eve', delimiter=',', mark='', change=unchanged):
        rows = [header]
        for i, (digest, _, case, chain, *_) in enumerate(empty):
            ratings = [str(given_rating(i, k)) for k in range(5)]
            rows.append([digest, rater, case, chain, *ratings])
        with open(tmp_path/name, 'w', newline='', encoding='utf-8') as f:
            f.write(mark)
            csv.writer(f, delimiter=delimiter).writerows(change(rows))
        return tmp_path/name

    return tmp_path/'key.csv', fill

def test_ratings_are_unblinded(sheet):
    key, fill = sheet
    found = read_ratings([fill(), fill('b.csv', '')], key)
    assert found.schema == RATING
    assert len(found) == 2*9*5
    assert set(found['rater']) == {'Eve', 'b'}
    chains = pl.read_csv(key).select('sample_id', 'system').rows()
    for i, (sample, system) in enumerate(chains):
        mine = found.filter(rater='Eve', sample_id=sample, system=system)
        expected = {question: given_rating(i, k) for k, question in enumerate(RATING_QUESTIONS)}
        assert dict(mine.select('question', 'rating').rows()) == expected

RATER_NAMES = st.text(st.characters(exclude_categories=['Cs', 'Cc', 'Zl', 'Zp']), max_size=20)

@settings(max_examples=60, deadline=None)
@given(rater=RATER_NAMES.map(str.strip).filter(bool), delimiter=st.sampled_from(',;\t'))
def test_any_name_and_any_spreadsheet(tmp_path_factory, rater, delimiter):
    folder = tmp_path_factory.mktemp('r')
    key = rating_sheet(make(1), folder, 1)
    empty_line = ['']*9
    rows = [['sheet', 'rater', 'case', 'chain', *RATING_QUESTIONS]]
    for digest, case, chain, *_ in key.rows():
        rows += [[digest, rater, case, chain, 5, 4, 3, 2, 1], empty_line]
    with open(folder/'x.csv', 'w', newline='', encoding='utf-8-sig') as f:
        csv.writer(f, delimiter=delimiter).writerows(rows)
    found = read_ratings(folder/'x.csv', folder/'key.csv')
    assert found['rater'].unique().to_list() == [rater]

def edit(line, column, value):
    "A change of one cell of a filled CSV; lines count from 1."
    def change(rows):
        rows[line - 1][column] = value
        return rows
    return change

def without_the_last_two(rows):
    return rows[:-2]

def header_alone(rows):
    return rows[:1]

def nothing(rows):
    return []

def one_cell_less_in_line_6(rows):
    return [*rows[:5], rows[5][:-1], *rows[6:]]

BAD_RATINGS = [
    (edit(4, 6, ''), 'eve.csv, line 4, column complete: no rating; fill in'),
    (edit(2, 4, '6'), "eve.csv, line 2, column supported: '6' is no rating"),
    (edit(2, 8, '0'), "column overall: '0'"),
    (edit(2, 8, '3.5'), "column overall: '3.5'"),
    (edit(2, 8, '٣'), "'٣'"),
    (edit(3, 2, '9'), "line 3, columns case, chain: no chain 'B' of case '9'"),
    (edit(3, 3, 'Z'), "no chain 'Z'"),
    (edit(3, 3, 'A'), 'line 3: case 1, chain A a second time'),
    (edit(3, 1, 'Bob'), "line 3, column rater: 'Bob' after 'Eve'"),
    (edit(3, 0, 'feed'), "line 3, column sheet: 'feed'"),
    (edit(1, 7, 'clarity'), "line 1: no column 'clear'"),
    (without_the_last_two, '2 of 9 chains are missing, the first is case 3, chain B'),
    (header_alone, '9 of 9 chains are missing'),
    (nothing, "line 1: no column 'sheet'"),
    (one_cell_less_in_line_6, 'line 6: 8 columns, line 1 has 9')]

@pytest.mark.parametrize('change, message', BAD_RATINGS, ids=[message for _, message in BAD_RATINGS])
def test_bad_ratings_are_named(sheet, change, message):
    key, fill = sheet
    path = fill(change=change)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_ratings([path], key)

def test_a_rater_with_two_files_is_named(sheet):
    key, fill = sheet
    paths = [fill(), fill('b.csv')]
    with pytest.raises(ValueError, match="b.csv: rater 'Eve' has eve.csv already"):
        read_ratings(paths, key)

def test_a_file_in_another_encoding_is_named(sheet):
    key, fill = sheet
    path = fill()
    path.write_bytes(path.read_bytes().replace(b'Eve', b'\xff'))
    with pytest.raises(ValueError, match='eve.csv: not UTF-8'):
        read_ratings(path, key)

def test_a_file_with_an_open_quote_is_named(sheet):
    key, fill = sheet
    path = fill()
    path.write_text(path.read_text().replace('Eve', '"Eve', 1))
    with pytest.raises(ValueError, match='eve.csv, line'):
        read_ratings(path, key)

def test_a_file_that_is_no_key_is_refused(sheet):
    _, fill = sheet
    path = fill()
    with pytest.raises(ValueError, match='no key of a rating sheet'):
        read_ratings(path, path)

# ---- the script of the page, with a document that has just enough

DOCUMENT = '''
const {page, steps} = JSON.parse(require('fs').readFileSync(0, 'utf8')), kept = new Map(), out = [];
globalThis.localStorage = {getItem: k => kept.has(k) ? kept.get(k) : null, setItem: (k, v) => kept.set(k, v)};
let file = null;
globalThis.Blob = class { constructor(parts) { file = parts.join(''); } };
URL.createObjectURL = () => 'blob:x'; URL.revokeObjectURL = () => {}; globalThis.setTimeout = () => {};
for (const {name, give} of steps) { // each step opens the page anew
  const listen = {};
  const element = id => (
    {value: '', textContent: '', addEventListener: (t, f) => listen[id] = f, focus() {}});
  const elements = Object.fromEntries(['rater', 'state', 'trouble', 'next', 'download'].map(id => [id, element(id)]));
  const inputs = page.inputs.map(([name, value]) => ({name, value, checked: false}));
  const articles = page.articles.map(dataset => ({dataset, classList: {toggle() {}}}));
  const document = {body: {dataset: page.body}, getElementById: id => elements[id], createElement: () => ({click() {}}),
    querySelectorAll: s => s === 'article' ? articles : inputs, addEventListener: (t, f) => listen[t] = f};
  new Function('document', page.script)(document);
  const before = [elements.rater.value, inputs.filter(i => i.checked).length];
  if (name !== null) elements.rater.value = name;
  for (const [n, v] of Object.entries(give)) for (const i of inputs) if (i.name === n) i.checked = i.value === v;
  listen.input(); file = null; listen.download();
  const state = elements.state.textContent, trouble = elements.trouble.textContent;
  out.push({before, file, state, trouble, places: [...kept.keys()]});
}
console.log(JSON.stringify(out));
'''

def data_attributes(attributes):
    "The data- attributes of an element, as its dataset has them."
    return {name.removeprefix('data-'): value for name, value in attributes.items() if name.startswith('data-')}

def parts_of(tree):
    "What the document above needs of a page."
    radios = [attributes for _, attributes, _ in tree.all('input') if attributes['type'] == 'radio']
    return dict(
        script=tree.all('script')[0][2],
        body=data_attributes(tree.all('body')[0][1]),
        articles=[data_attributes(attributes) for _, attributes, _ in tree.all('article')],
        inputs=[(attributes['name'], attributes['value']) for attributes in radios])

def run_page(page, steps):
    "What a page shows, keeps and exports at each step."
    asked = json.dumps(dict(page=page, steps=steps))
    ran = subprocess.run(['node', '-e', DOCUMENT], input=asked, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)

@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed; it runs the script of the rating page')
def test_page_keeps_what_was_filled_in_and_exports_what_can_be_read(tmp_path):
    key = rating_sheet(make(2), tmp_path, 1)
    page = parts_of(Page((tmp_path/'sheet'/'rating.html').read_text()))
    groups = list(dict(page['inputs']))
    given = {group: str(1 + i % 5) for i, group in enumerate(groups)}
    seven = {group: given[group] for group in groups[:7]}
    eve = 'Dr. "Eve", x; y'
    steps = [dict(name=None, give=seven), dict(name=eve, give={}), dict(name=None, give=given)]
    first, second, third = run_page(page, steps)

    # seven ratings, but no name
    assert first['before'] == ['', 0]
    assert first['file'] is None
    assert 'name' in first['trouble']
    assert first['places'] == [f"rating-{key['sheet'][0]}"]
    # a name
    assert second['before'] == ['', 7]
    assert second['state'] == '7 of 30 ratings given'
    assert '23 ratings are still missing' in second['trouble']
    part = tmp_path/'part.csv'
    part.write_text(second['file'], newline='')
    with pytest.raises(ValueError, match='part.csv, line 3, column complete: no rating'):
        read_ratings(part, tmp_path/'key.csv')
    # all ratings
    assert third['before'] == [eve, 7]
    assert third['state'] == 'All 30 ratings given'
    assert third['trouble'] == ''
    whole = tmp_path/'all.csv'
    whole.write_text(third['file'], newline='')
    found = read_ratings(whole, tmp_path/'key.csv')
    behind = {(str(case), chain): (sample, system) for _, case, chain, sample, system in key.rows()}
    expected = set()
    for group, value in given.items():
        case, chain, question = group.split('-')[:3]
        expected.add((eve, *behind[case, chain], question, int(value)))
    assert set(found.rows()) == expected
    assert len(found) == 30

# ---- agreement

def ratings(**by_rater):
    "One question; the i-th rating of each rater is of chain i, None where there is none."
    rows = []
    for rater, values in by_rater.items():
        rows += [(rater, str(i), 's', 'clear', value) for i, value in enumerate(values) if value]
    return pl.DataFrame(rows, RATING, orient='row')

def measures(frame):
    "Each measure's value and interval."
    columns = agreement(frame).select('measure', 'value', 'low', 'high')
    return {measure: numbers for measure, *numbers in columns.rows()}

def test_kappa_and_interval_by_hand():
    # 20 times 4,4; 15 times 5,5; 5 times 4,5; 10 times 5,4: observed .7, by chance .5*.6 + .5*.4 = .5
    a = [4]*20 + [5]*15 + [4]*5 + [5]*10
    b = [4]*20 + [5]*15 + [5]*5 + [4]*10
    value, low, high = measures(ratings(a=a, b=b))['kappa']
    assert value == pytest.approx(.4)
    # large-sample variance: (.10972 + .10188 - .01)/(.25*50)
    half = 1.959964*(.2016/12.5)**.5
    assert (low, high) == pytest.approx((.4 - half, .4 + half))

def test_weighted_kappa_by_hand():
    # squared distances: 0 0 1 4 0 16, mean 3.5; by chance, mean over all pairs of the two sets of ratings
    a = [1, 2, 3, 4, 5, 5]
    b = [1, 2, 4, 2, 5, 1]
    by_chance = mean((x - y)**2 for x in a for y in b)
    found = measures(ratings(a=a, b=b))['weighted kappa']
    assert found[0] == pytest.approx(1 - 3.5/by_chance)

def test_near_misses_cost_less_in_weighted_kappa():
    near = measures(ratings(a=[1, 2, 3, 4, 5], b=[2, 3, 4, 5, 4]))
    assert near['kappa'][0] < 0 < near['weighted kappa'][0]

def test_fleiss_kappa_by_hand():
    # chains rated 111, 112, 222, 122: agreeing pairs of raters 1, 1/3, 1, 1/3; ones and twos six each, so chance is .5
    found = measures(ratings(a=[1, 1, 2, 1], b=[1, 1, 2, 2], c=[1, 2, 2, 2]))
    expected = (2/3 - .5)/.5
    assert found["Fleiss' kappa"] == [pytest.approx(expected), None, None]

def test_perfect_agreement_is_one():
    same = measures(ratings(a=[1, 2, 3], b=[1, 2, 3], c=[1, 2, 3]))
    for value, _, _ in same.values():
        assert value == pytest.approx(1)
    assert same['kappa'] == pytest.approx((1, 1, 1))

def test_agreement_on_one_value_alone_is_unknown():
    constant = measures(ratings(a=[4, 4], b=[4, 4], c=[4, 4]))
    assert list(constant.values()) == [[None]*3]*3

def test_no_agreement_is_zero():
    apart = measures(ratings(a=[4, 4, 4], b=[5, 5, 5]))
    assert apart['kappa'][0] == 0

def test_each_pair_uses_the_chains_both_have_rated():
    frame = ratings(a=[1, 2, 3, 4, None], b=[1, 2, 3, 4, 5], c=[None, None, 3, 4, 1])
    counted = agreement(frame).select('measure', 'raters', 'chains').rows()
    chains = {(measure, raters): n for measure, raters, n in counted}
    assert chains == {
        ('kappa', 'a & b'): 4, ('kappa', 'a & c'): 2, ('kappa', 'b & c'): 3,
        ('weighted kappa', 'a & b'): 4, ('weighted kappa', 'a & c'): 2, ('weighted kappa', 'b & c'): 3,
        ("Fleiss' kappa", 'a & b & c'): 2}

def test_a_pair_without_common_chains_has_no_agreement():
    apart = measures(ratings(a=[1, 2, None, None], b=[None, None, 3, 4]))
    assert apart == {'kappa': [None]*3, 'weighted kappa': [None]*3}

def test_one_rater_cannot_agree():
    with pytest.raises(ValueError, match="two raters or more; there is 'a'"):
        agreement(ratings(a=[1, 2]))

def test_cases_have_the_columns_to_rate():
    assert set(RATED) == set(make().columns)
