"Split, sampling and candidates."
import numpy as np, polars as pl
from ehr_r1.profiles import profile
from ehr_r1.data.samples import Candidates, choose, split_of

def index(n=4000, task='services', label=lambda i: ['MED'], seed=0, **columns):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(dict(subject_id=rng.integers(0, 500, n), trigger=np.arange(n), task=[task]*n, label=[label(i) for i in range(n)], begin=[1]*n, end=[30]*n, admissions_event=[1]*n, patient_events=[99]*n) | columns, schema_overrides=dict(trigger=pl.Int32))

def test_no_patient_is_in_two_splits_and_the_split_depends_on_the_patient_alone():
    ids = np.arange(10_000_000, 10_020_000); whole = split_of(ids, 42)
    assert (split_of(ids[::-1], 42)[::-1] == whole).all() and (split_of(ids[:7], 42) == whole[:7]).all() and (split_of(ids, 43) != whole).any()
    share = {s: (whole == s).mean() for s in ('train', 'tuning', 'held_out')}
    assert abs(share['train'] - .8) < .01 and abs(share['tuning'] - .1) < .01
    a, b = choose(index(), profile('smoke'))[0], choose(index(task='poe'), profile('smoke'))[0]
    both = pl.concat([a, b]).group_by('subject_id').agg(pl.col('split').n_unique(), pl.col('set').n_unique())
    assert both['split'].max() == 1 and both['set'].max() == 1 and set(a.filter(pl.col('set') == 'ehr_bench')['split']) == {'held_out'}

def test_who_is_chosen_does_not_depend_on_order():
    rows = index(); shuffled = rows.sample(fraction=1, shuffle=True, seed=3)
    assert set(choose(rows, profile('smoke'))[0]['trigger']) == set(choose(shuffled, profile('smoke'))[0]['trigger'])

def test_caps():
    p = profile('smoke', ins_per_task=50, bench_per_task=20)
    chosen, counts = choose(index(), p)
    assert counts['ehr_ins'] == 50 and counts['ehr_bench'] == 20
    risk, counts = choose(index(task='Inpatient_Mortality', label=lambda i: ['yes' if i % 9 == 0 else 'no']), p)
    assert risk.group_by('set', pl.col('label').list.first()).len()['len'].sort().to_list() == [10, 10, 25, 25]
    few, counts = choose(index(n=300, task='Inpatient_Mortality', label=lambda i: ['yes' if i == 5 else 'no']), p)
    assert (few['label'].list.first() == 'yes').sum() == 1 # as many as there are

def test_rare_labels_are_preferred():
    chosen, _ = choose(index(label=lambda i: ['RARE' if i % 40 == 0 else 'MED']), profile('smoke', ins_per_task=400))
    assert (chosen.filter(pl.col('set') == 'ehr_ins')['label'].list.first() == 'RARE').mean() > .15 > 1/40

def test_filters_are_counted_and_none_means_none():
    rows = index(n=6, end=[5, 30, 200, 30, 30, 30], patient_events=[99, 99, 99, 5000, 99, 99])
    chosen, counts = choose(rows, profile('smoke'))
    assert counts['eligible'] == 3 and sum(counts['dropped'].values()) == 3 and len(counts['dropped']) == 3
    assert choose(rows, profile('smoke', caps='none'))[1]['eligible'] == 6
    back = index(n=3, task='diagnoses_icd', begin=[1, 2, 3], admissions_event=[2, 2, 2])
    assert choose(back, profile('smoke', protocol='strict'))[1]['eligible'] == 2 and choose(back, profile('smoke', protocol='official'))[1]['eligible'] == 1
    assert choose(index(n=2, task='chartevents', label=lambda i: [f'x{k}' for k in range(9 + i)]), profile('smoke'))[1]['eligible'] == 1

def test_candidates():
    labels = [f'Sodium {i}' for i in range(150)] + [f'Lactate {i}' for i in range(150)]
    c = Candidates(labels, 'labevents', 42, ['Unseen'])
    got = c('1-labevents-2', ['Sodium 7', 'Unseen'])
    assert {'Sodium 7', 'Unseen'} <= set(got) and len(got) <= 102 and len(set(got)) == len(got) and got == c('1-labevents-2', ['Sodium 7', 'Unseen']) and got != sorted(got)
    assert sum(g.startswith('Sodium') for g in c('x', ['Sodium 7'])) >= 95 # look-alikes first
    assert Candidates([], 'ED_Hospitalization', 42)('x', ['yes']) == ['yes', 'no']
    assert sorted(Candidates(['A', 'B'], 'services', 42)('x', ['C'])) == ['A', 'B', 'C']
