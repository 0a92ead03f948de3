//! Random numbers against CPython and NumPy.

mod common;

use common::{of, read, rows};
use opt_metrics::random::{NumpyRandom, PythonRandom};

#[test]
fn draws_equal_cpythons() {
    for row in rows(&read("random.json")["python"]) {
        let seed: u64 = row["seed"].as_str().unwrap().parse().unwrap();
        let mut random = PythonRandom::new(seed);
        for expected in of::<Vec<f64>>(&row["random"]) {
            assert_eq!(random.random(), expected, "seed {seed}");
        }
        for (k, expected) in
            [0, 1, 7, 31, 32, 33, 64, 65, 128].into_iter().zip(of::<Vec<String>>(&row["bits"]))
        {
            assert_eq!(random.getrandbits(k).unwrap().to_string(), expected, "seed {seed}, {k} bits");
        }
        let limits = [1, 2, 3, 1000, 1 << 31, (1 << 33) + 1];
        for (n, expected) in limits.into_iter().zip(of::<Vec<u64>>(&row["below"])) {
            assert_eq!(random.randbelow(n).unwrap(), expected, "seed {seed}, below {n}");
        }
        let ends = [(0, 0), (-5, 5), (1, 6), (i64::MIN, i64::MAX)];
        for ((a, b), expected) in ends.into_iter().zip(of::<Vec<i64>>(&row["randint"])) {
            assert_eq!(random.randint(a, b).unwrap(), expected, "seed {seed}, {a} to {b}");
        }
        for sample in rows(&row["sample"]) {
            let (n, k, expected): (usize, usize, Vec<usize>) = of(sample);
            assert_eq!(random.sample(n, k).unwrap(), expected, "seed {seed}, {k} of {n}");
        }
        for choices in rows(&row["choices"]) {
            let (n, k, expected): (usize, usize, Vec<usize>) = of(choices);
            assert_eq!(random.choices(n, k).unwrap(), expected, "seed {seed}, {k} from {n}");
        }
        let mut items: Vec<usize> = (0..20).collect();
        random.shuffle(&mut items);
        assert_eq!(items, of::<Vec<usize>>(&row["shuffled"]));
        let last = (0..700).map(|_| random.random()).last().unwrap();
        assert_eq!(last, of::<f64>(&row["last"]), "seed {seed}");
    }
}

#[test]
fn draws_equal_numpys() {
    for row in rows(&read("random.json")["numpy"]) {
        let mut random = NumpyRandom::new(of(&row[0]));
        for choice in rows(&row[1]) {
            let (n, k, expected): (usize, usize, Vec<usize>) = of(choice);
            assert_eq!(random.choice(n, k).unwrap(), expected, "{k} from {n}");
        }
    }
}

#[test]
fn what_cannot_be_drawn_is_an_error() {
    let mut random = PythonRandom::new(0);
    assert!(random.getrandbits(129).is_err());
    assert!(random.randbelow(0).is_err());
    assert!(random.randint(1, 0).is_err());
    assert!(random.sample(3, 4).is_err());
    assert!(random.sample(usize::MAX, usize::MAX).is_err());
    assert!(random.choices(0, 1).is_err());
    assert!(random.choices(1, usize::MAX).is_err());
    assert!(random.choices(0, 0).unwrap().is_empty());
    assert!(NumpyRandom::new(0).choice(0, 1).is_err());
    random.shuffle::<u8>(&mut []);
}
