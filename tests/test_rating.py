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

from ehr_r1.synthesis.agreement import RATING, agreement, read_ratings
from ehr_r1.synthesis.rating import RATED, RATING_QUESTIONS, blinded, rating_page, rating_sheet

HOSTILE = ('</script><script>alert(1)</script><img src=x onerror="alert(1)"> \'q\' &amp; <!-- ]]> '
           '\x00\x1b\u202e {digest} ${x}\r\nnext "line"\n')
SEEN = re.sub('[\x00\x1b\u202e]', '\ufffd', HOSTILE)
SYSTEMS = ('secret-graph', 'secret-plain', 'secret-third')

def make(n=6, systems=SYSTEMS, **text):
    row = lambda i, s: dict(sample_id=f'77700{i}-emar-3', system=s, task='emar', record=f'record {i}', answer='Heparin',
                            chain=f'chain {i}')
    return pl.DataFrame([row(i, s) | text for i in range(n) for s in systems])

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
        if tag not in self.VOID: self.open.append(element)
    def handle_endtag(self, tag): assert self.open.pop()[0] == tag
    def handle_data(self, data):
        if self.open: self.open[-1][2] += data
        else: assert not data.strip()
    def handle_comment(self, data): raise AssertionError(f'a comment: {data}')
    def unknown_decl(self, data): raise AssertionError(f'a declaration: {data}')
    def all(self, tag): return [e for e in self.elements if e[0] == tag]

def texts(page): return [t for tag, a, t in page.elements if tag == 'div' and 'text' in a.get('class', '').split()]

# ---- the sheet

def test_letters_hide_the_systems(tmp_path):
    cases = make(40)
    key = rating_sheet(cases, tmp_path, 3)
    for path in (tmp_path/'sheet').iterdir(): assert not re.search('secret|77700', path.read_text())
    assert {p.name for p in (tmp_path/'sheet').iterdir()} == {'rating.html', 'ratings.csv'}
    behind = key.group_by('system', 'chain').len()
    assert len(behind) == 9 and behind['len'].min() >= 5                    # every system under every letter
    assert key['case'].unique().sort().to_list() == list(range(1, 41))
    first = key.unique('case', maintain_order=True)['sample_id'].to_list()
    assert sorted(first) != first and set(key['sample_id']) == set(cases['sample_id'])

def test_seed_alone_decides_the_order(tmp_path):
    cases = make()
    a, b = blinded(cases, 1), blinded(cases.sample(fraction=1, shuffle=True, seed=9), 1)
    assert a.equals(b) and not a.equals(blinded(cases, 2))
    kept = blinded(cases.filter(pl.col('system') != SYSTEMS[1]), 1)         # without one system the others keep their order
    whole = a.filter(pl.col('system') != SYSTEMS[1])
    assert kept['system'].to_list() == whole['system'].to_list()
    for name in ('x', 'y'): rating_sheet(cases, tmp_path/name, 1)
    for name in ('sheet/rating.html', 'sheet/ratings.csv', 'key.csv'):
        assert (tmp_path/'x'/name).read_bytes() == (tmp_path/'y'/name).read_bytes()

def test_digest_names_what_raters_see(tmp_path):
    digest = lambda cases, seed=1: rating_sheet(cases, tmp_path, seed)['sheet'][0]
    one = digest(make())
    assert one == digest(make()) and len({one, digest(make(), 2), digest(make(record='other')), digest(make(5))}) == 4

def test_any_text_stays_text():
    page = rating_page(blinded(make(2, task=HOSTILE, record=HOSTILE, answer=HOSTILE, chain=HOSTILE)), 'abc')
    tree = Page(page)
    assert len(tree.all('script')) == 1 and not tree.all('img') and not tree.all('link') and not tree.all('a')
    assert len(texts(tree)) == 2*(2 + 3) and set(texts(tree)) == {SEEN}
    assert len(tree.all('input')) == 1 + 2*3*len(RATING_QUESTIONS)*5
    for tag, attributes, _ in tree.elements:
        assert not [a for a in attributes if a.startswith('on') or a in ('src', 'href', 'style', 'action')], tag

@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=['Cs', 'Cc']), max_size=60),
       st.text(st.sampled_from('<>&"\'/!-={}$\\ab;#x1\n '), max_size=40))
def test_texts_come_back_as_they_were(any_text, tricky):
    tree = Page(rating_page(blinded(make(1, record=any_text, chain=tricky)), 'abc'))
    answer, record, *chains = texts(tree)
    hidden = re.compile('[\u202a-\u202e\u2066-\u2069]')
    assert answer == 'Heparin' and record == hidden.sub('\ufffd', any_text) and chains == [tricky]*3

def test_page_loads_and_sends_nothing():
    page = rating_page(blinded(make()), 'abc')
    tree = Page(page)
    policy = next(a['content'] for _, a, _ in tree.all('meta') if a.get('http-equiv') == 'Content-Security-Policy')
    for tag in ('script', 'style'):
        digest = base64.b64encode(hashlib.sha256(tree.all(tag)[0][2].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert not re.search(r'https?:|//[a-z]|fetch\(|XMLHttpRequest|sendBeacon|innerHTML|document\.write|eval\(', page)

def cell_errors(): # (change to a frame of cases, what the message says)
    yield lambda c: c.drop('chain'), "no column 'chain'"
    yield lambda c: c.with_columns(answer=pl.concat_list('answer')), "column 'answer' is List"
    yield lambda c: c.with_columns(record=pl.lit(None, pl.String)), "column 'record' has empty"
    yield lambda c: c.head(0), 'none to rate'
    yield lambda c: pl.concat([c, c.head(1)]), "'777000-emar-3' has two chains of system 'secret-graph'"
    yield lambda c: c.with_columns(record=pl.lit('r') + pl.col('system')), "'777000-emar-3' has different values of 'record'"
    yield lambda c: make(1, [f's{i}' for i in range(27)]), 'more than 26'

@pytest.mark.parametrize('change, message', list(cell_errors()), ids=lambda x: x if isinstance(x, str) else '')
def test_bad_cases_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)): rating_sheet(change(make(2)), tmp_path)
    assert not list(tmp_path.iterdir())

# ---- reading

@pytest.fixture
def sheet(tmp_path):
    "A sheet, and a function that writes a filled CSV."
    rating_sheet(make(3), tmp_path, 1)
    form = list(csv.reader((tmp_path/'sheet'/'ratings.csv').read_text().splitlines()))
    def fill(name='eve.csv', rater='Eve', delimiter=',', mark='', change=lambda rows: rows):
        rows = [form[0]] + [[r[0], rater, *r[2:4], *(str(1 + (i + k) % 5) for k in range(5))] for i, r in enumerate(form[1:])]
        with open(tmp_path/name, 'w', newline='', encoding='utf-8') as f:
            f.write(mark)
            csv.writer(f, delimiter=delimiter).writerows(change(rows))
        return tmp_path/name
    return tmp_path/'key.csv', fill

def test_ratings_are_unblinded(sheet):
    key, fill = sheet
    found = read_ratings([fill(), fill('b.csv', '')], key)
    assert found.schema == RATING and len(found) == 2*9*5 and set(found['rater']) == {'Eve', 'b'}
    for i, (_, case, chain, sample, system) in enumerate(pl.read_csv(key).iter_rows()):
        mine = found.filter(rater='Eve', sample_id=sample, system=system)
        assert dict(mine.select('question', 'rating').rows()) == {q: 1 + (i + k) % 5 for k, q in enumerate(RATING_QUESTIONS)}

@settings(max_examples=60, deadline=None)
@given(rater=st.text(st.characters(exclude_categories=['Cs', 'Cc', 'Zl', 'Zp']), max_size=20).map(str.strip).filter(bool),
       delimiter=st.sampled_from(',;\t'))
def test_any_name_and_any_spreadsheet(tmp_path_factory, rater, delimiter):
    folder = tmp_path_factory.mktemp('r')
    key = rating_sheet(make(1), folder, 1)
    with open(folder/'x.csv', 'w', newline='', encoding='utf-8-sig') as f:
        out = csv.writer(f, delimiter=delimiter)
        out.writerow(['sheet', 'rater', 'case', 'chain', *RATING_QUESTIONS])
        for s, case, chain, *_ in key.rows(): out.writerows([[s, rater, case, chain, 5, 4, 3, 2, 1], ['']*9])
    assert read_ratings(folder/'x.csv', folder/'key.csv')['rater'].unique().to_list() == [rater]

def edit(line, column, value):
    def change(rows):
        rows[line - 1][column] = value
        return rows
    return change

@pytest.mark.parametrize('change, message', [
    (edit(4, 6, ''), 'eve.csv, line 4, column complete: no rating; fill in'),
    (edit(2, 4, '6'), "eve.csv, line 2, column supported: '6' is no rating"),
    (edit(2, 8, '0'), "column overall: '0'"), (edit(2, 8, '3.5'), "column overall: '3.5'"), (edit(2, 8, '٣'), "'٣'"),
    (edit(3, 2, '9'), "line 3, columns case, chain: no chain 'B' of case '9'"), (edit(3, 3, 'Z'), "no chain 'Z'"),
    (edit(3, 3, 'A'), 'line 3: case 1, chain A a second time'),
    (edit(3, 1, 'Bob'), "line 3, column rater: 'Bob' after 'Eve'"),
    (edit(3, 0, 'feed'), "line 3, column sheet: 'feed'"),
    (edit(1, 7, 'clarity'), "line 1: no column 'clear'"),
    (lambda rows: rows[:-2], '2 of 9 chains are missing, the first is case 3, chain B'),
    (lambda rows: rows[:1], '9 of 9 chains are missing'), (lambda rows: [], "line 1: no column 'sheet'"),
    (lambda rows: [*rows[:5], rows[5][:-1], *rows[6:]], 'line 6: 8 columns, line 1 has 9'),
], ids=str)
def test_bad_ratings_are_named(sheet, change, message):
    key, fill = sheet
    with pytest.raises(ValueError, match=re.escape(message)): read_ratings([fill(change=change)], key)

def test_bad_files_are_named(sheet, tmp_path):
    key, fill = sheet
    with pytest.raises(ValueError, match="b.csv: rater 'Eve' has eve.csv already"): read_ratings([fill(), fill('b.csv')], key)
    path = fill()
    path.write_bytes(path.read_bytes().replace(b'Eve', b'\xff'))
    with pytest.raises(ValueError, match='eve.csv: not UTF-8'): read_ratings(path, key)
    path = fill()
    path.write_text(path.read_text().replace('Eve', '"Eve', 1))
    with pytest.raises(ValueError, match='eve.csv, line'): read_ratings(path, key)
    with pytest.raises(ValueError, match='no key of a rating sheet'): read_ratings(fill(), path)

# ---- the script of the page, with a document that has just enough

DOCUMENT = '''
const {page, steps} = JSON.parse(require('fs').readFileSync(0, 'utf8')), kept = new Map(), out = [];
globalThis.localStorage = {getItem: k => kept.has(k) ? kept.get(k) : null, setItem: (k, v) => kept.set(k, v)};
let file = null;
globalThis.Blob = class { constructor(parts) { file = parts.join(''); } };
URL.createObjectURL = () => 'blob:x'; URL.revokeObjectURL = () => {}; globalThis.setTimeout = () => {};
for (const {name, give} of steps) { // each step opens the page anew
  const listen = {}, element = id => ({value: '', textContent: '', addEventListener: (t, f) => listen[id] = f, focus() {}});
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
  out.push({before, file, state: elements.state.textContent, trouble: elements.trouble.textContent, places: [...kept.keys()]});
}
console.log(JSON.stringify(out));
'''

@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed; it runs the script of the rating page')
def test_page_keeps_what_was_filled_in_and_exports_what_can_be_read(tmp_path):
    key = rating_sheet(make(2), tmp_path, 1)
    tree, digest = Page((tmp_path/'sheet'/'rating.html').read_text()), key['sheet'][0]
    data = lambda a: {k.removeprefix('data-'): v for k, v in a.items() if k.startswith('data-')}
    page = dict(script=tree.all('script')[0][2], body=data(tree.all('body')[0][1]),
                articles=[data(a) for _, a, _ in tree.all('article')],
                inputs=[(a['name'], a['value']) for _, a, _ in tree.all('input') if a['type'] == 'radio'])
    groups = list(dict(page['inputs']))
    given = {g: str(1 + i % 5) for i, g in enumerate(groups)}
    eve = 'Dr. "Eve", x; y'
    steps = [dict(name=None, give=dict(list(given.items())[:7])), dict(name=eve, give={}), dict(name=None, give=given)]
    ran = subprocess.run(['node', '-e', DOCUMENT], input=json.dumps(dict(page=page, steps=steps)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    first, second, third = json.loads(ran.stdout)
    assert first['before'] == ['', 0] and first['file'] is None and 'name' in first['trouble']
    assert first['places'] == [f'rating-{digest}']
    assert second['before'] == ['', 7] and second['state'] == '7 of 30 ratings given'
    assert '23 ratings are still missing' in second['trouble']
    assert third['before'] == [eve, 7] and third['state'] == 'All 30 ratings given' and third['trouble'] == ''
    (tmp_path/'part.csv').write_text(second['file'], newline='')
    with pytest.raises(ValueError, match='part.csv, line 3, column complete: no rating'):
        read_ratings(tmp_path/'part.csv', tmp_path/'key.csv')
    (tmp_path/'all.csv').write_text(third['file'], newline='')
    found = read_ratings(tmp_path/'all.csv', tmp_path/'key.csv')
    of = {(str(case), chain): (sample, system) for _, case, chain, sample, system in key.rows()}
    expected = {(eve, *of[tuple(g.split('-')[:2])], g.split('-')[2], int(v)) for g, v in given.items()}
    assert set(found.rows()) == expected and len(found) == 30

# ---- agreement

def ratings(**by_rater):
    "One question; the i-th rating of each rater is of chain i, None where there is none."
    rows = [(r, str(i), 's', 'clear', v) for r, vs in by_rater.items() for i, v in enumerate(vs) if v]
    return pl.DataFrame(rows, RATING, orient='row')

def values(frame): return {m: x for m, *x in agreement(frame).select('measure', 'value', 'low', 'high').rows()}

def test_kappa_and_interval_by_hand():
    # 20 times 4,4; 15 times 5,5; 5 times 4,5; 10 times 5,4: observed .7, by chance .5*.6 + .5*.4 = .5
    a, b = [4]*20 + [5]*15 + [4]*5 + [5]*10, [4]*20 + [5]*15 + [5]*5 + [4]*10
    value, low, high = values(ratings(a=a, b=b))['kappa']
    assert value == pytest.approx(.4)
    # large-sample variance: (.10972 + .10188 - .01)/(.25*50)
    half = 1.959964*(.2016/12.5)**.5
    assert (low, high) == pytest.approx((.4 - half, .4 + half))

def test_weighted_kappa_by_hand():
    # squared distances: 0 0 1 4 0 16, mean 3.5; by chance, mean over all pairs of the two sets of ratings
    a, b = [1, 2, 3, 4, 5, 5], [1, 2, 4, 2, 5, 1]
    expected = 1 - 3.5/mean((x - y)**2 for x in a for y in b)
    assert values(ratings(a=a, b=b))['weighted kappa'][0] == pytest.approx(expected)

def test_near_misses_cost_less_in_weighted_kappa():
    near = values(ratings(a=[1, 2, 3, 4, 5], b=[2, 3, 4, 5, 4]))
    assert near['kappa'][0] < 0 < near['weighted kappa'][0]

def test_fleiss_kappa_by_hand():
    # chains rated 111, 112, 222, 122: agreeing pairs of raters 1, 1/3, 1, 1/3; ones and twos six each, so chance is .5
    found = values(ratings(a=[1, 1, 2, 1], b=[1, 1, 2, 2], c=[1, 2, 2, 2]))
    assert found["Fleiss' kappa"] == [pytest.approx((2/3 - .5)/.5), None, None]

def test_perfect_agreement_and_none_at_all():
    same = values(ratings(a=[1, 2, 3], b=[1, 2, 3], c=[1, 2, 3]))
    assert all(v == pytest.approx(1) for v, _, _ in same.values()) and same['kappa'] == pytest.approx((1, 1, 1))
    constant = values(ratings(a=[4, 4], b=[4, 4], c=[4, 4]))
    assert list(constant.values()) == [[None]*3]*3
    assert values(ratings(a=[4, 4, 4], b=[5, 5, 5]))['kappa'][0] == 0

def test_each_pair_uses_the_chains_both_have_rated():
    frame = ratings(a=[1, 2, 3, 4, None], b=[1, 2, 3, 4, 5], c=[None, None, 3, 4, 1])
    chains = {(m, r): n for m, r, n in agreement(frame).select('measure', 'raters', 'chains').rows()}
    pairs = {'a & b': 4, 'a & c': 2, 'b & c': 3}
    cohen = {(m, r): n for m in ('kappa', 'weighted kappa') for r, n in pairs.items()}
    assert chains == cohen | {("Fleiss' kappa", 'a & b & c'): 2}
    apart = values(ratings(a=[1, 2, None, None], b=[None, None, 3, 4]))
    assert apart == {'kappa': [None]*3, 'weighted kappa': [None]*3}

def test_one_rater_cannot_agree():
    with pytest.raises(ValueError, match="two raters or more; there is 'a'"): agreement(ratings(a=[1, 2]))
    assert set(RATED) == set(make().columns)
