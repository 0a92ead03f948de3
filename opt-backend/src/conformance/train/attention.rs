//! Gradients of attention within spans.

use crate::conformance::{
    Outcome, Run,
    data::{Data, read},
};
use crate::{Attend, Span, Train, oracle::gradient};
use ndarray::{Array2, s};

/// (heads, head_dim)
const HEADS: [(usize, usize); 7] = [(1, 1), (1, 80), (2, 64), (3, 7), (3, 80), (12, 8), (2, 128)];

pub(super) fn run<B: Train>(run: &mut Run<'_, B>) {
    let lengths: [&[usize]; 10] = [
        &[],
        &[0],
        &[1],
        &[2],
        &[33],
        &[70],
        &[1, 1, 1, 1],
        &[3, 0, 1, 17, 0],
        &[0, 5, 64, 1, 2, 65, 9],
        &[31, 32, 1],
    ];
    for (heads, head_dim) in HEADS {
        for lengths in lengths {
            let case = format!("{heads} heads of {head_dim}, spans {lengths:?}");
            run.case("attend_grad", case, |b, data| {
                let rows = lengths.iter().sum();
                let x = [(); 4].map(|()| data.matrix(rows, heads * head_dim));
                check(b, data, &x, heads, &Span::lay_out(lengths.iter().copied()))
            });
        }
    }
    run.case("attend_grad", "spans out of order and with gaps", |b, data| {
        let x = [(); 4].map(|()| data.matrix(40, 32));
        let spans = [(21, 7), (0, 5), (9, 0), (10, 1), (30, 10)].map(|(start, len)| Span { start, len });
        check(b, data, &x, 2, &spans)
    });
    run.case("attend_grad", "rows that no span covers", |b, data| {
        let x = [(); 4].map(|()| data.matrix(4, 8));
        check(b, data, &x, 1, &[])
    });
    // Scores of some hundreds: exp overflows unless the largest is subtracted first.
    run.case("attend_grad", "large scores", |b, data| {
        let mut x = [(); 4].map(|()| data.matrix(40, 2 * 64));
        x[0].mapv_inplace(|v| 32.0 * v);
        x[0] = data.held(x[0].clone());
        check(b, data, &x, 2, &Span::lay_out([7, 33]))
    });
    if run.suite.heavy {
        run.case("attend_grad", "2 heads of 64, a span of 700 and one of 90", |b, data| {
            let x = [(); 4].map(|()| data.matrix(790, 2 * 64));
            check(b, data, &x, 2, &Span::lay_out([700, 90]))
        });
    }
}

fn check<B: Train>(b: &B, data: &Data, x: &[Array2<f32>; 4], heads: usize, spans: &[Span]) -> Outcome {
    let [q, k, v, dy] = x;
    let [tq, tk, tv, ty] = [q, k, v, dy].map(|x| b.upload(x.view()));
    let (tq, tk, tv, ty) = (tq?, tk?, tv?, ty?);
    // There is no cache whose layer it could be.
    let attend = Attend { heads, layer: 3, spans };
    let found = b.attend_grad([&tq, &tk, &tv], &ty, attend)?;
    let mut expected = [(); 3].map(|()| Array2::zeros(q.dim()));
    for span in spans {
        let rows = s![span.rows(), ..];
        let [q, k, v, dy] = [q, k, v, dy].map(|x| x.slice(rows));
        for (all, of_span) in expected.iter_mut().zip(gradient::attend(q, k, v, heads, dy)) {
            all.slice_mut(rows).assign(&of_span);
        }
    }
    for ((name, found), expected) in ["dq", "dk", "dv"].iter().zip(&found).zip(&expected) {
        data.tolerance().compare(name, read(b, found)?.view(), expected.view())?;
    }
    for (name, (tensor, x)) in ["q", "k", "v", "dy"].iter().zip([&tq, &tk, &tv, &ty].into_iter().zip(x)) {
        super::unchanged(b, name, tensor, x)?;
    }
    Ok(())
}
