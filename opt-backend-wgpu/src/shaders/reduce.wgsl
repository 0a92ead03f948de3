// The sum of one number per thread, the same for all threads. The caller declares nothing else in `shared_sum`.
#if SUBGROUPS
var<workgroup> shared_sum: array<f32, $SUBGROUPS_MOST>;

fn total(v: f32, thread: u32, lane: u32, subgroup: u32, subgroups: u32) -> f32 {
    let sum = subgroupAdd(v);
    workgroupBarrier();
    if (lane == 0u) { shared_sum[subgroup] = sum; }
    workgroupBarrier();
    var all = 0.0;
    for (var i = 0u; i < subgroups; i++) { all += shared_sum[i]; }
    return all;
}
#else
var<workgroup> shared_sum: array<f32, $THREADS>;

fn total(v: f32, thread: u32) -> f32 {
    workgroupBarrier();
    shared_sum[thread] = v;
    for (var half = $THREADSu / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) { shared_sum[thread] += shared_sum[thread + half]; }
    }
    workgroupBarrier();
    return shared_sum[0];
}
#endif
