// out = a b, or plus that, where a thread keeps to itself: four columns of eight rows. For software adapters, which pay for
// every barrier; neighbours read neighbouring columns of b and the same of a.
#include operands

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = (group.y * groups.x + group.x) * 64u + thread;
    let quads = (args.columns + 3u) / 4u;
    let quad = id % quads;
    let first_row = id / quads * 8u;
    if (first_row >= args.rows) { return; }
#if TABLE
    set_levels(0u);
#endif

#repeat r 8
    var sum$r = vec4<f32>(0.0);
#end
    // Many steps to an iteration: llvmpipe ends all loops of a shader after 65,535 in all. Fewer where a step is much code.
    for (var k = 0u; k < args.depth; k += 4u * $UNROLLEDu) {
#if ACROSS_A
#repeat j 16
        if (k + $ju < args.depth) {
            let b = b_quad(k + $ju, quad);
            let at = (k + $ju) * args.a_stride + args.a_at + first_row / 4u;
            let v0 = a[at];
            var v1 = vec4<f32>(0.0);
            if (first_row + 4u < args.rows) { v1 = a[at + 1u]; }
            sum0 += v0.x * b;
            sum1 += v0.y * b;
            sum2 += v0.z * b;
            sum3 += v0.w * b;
            sum4 += v1.x * b;
            sum5 += v1.y * b;
            sum6 += v1.z * b;
            sum7 += v1.w * b;
        }
#end
#else
#repeat j $UNROLLED
        {
            let step = k + $ju * 4u;
            if (step < args.depth) {
                let deep = columns_from(step) < vec4<u32>(args.depth);
#if ACROSS_B
                let b0 = b_quad(step, quad);
#repeat i 3
                var b_$i = vec4<f32>(0.0);
                if (step + $iu + 1u < args.depth) { b_$i = b_quad(step + $iu + 1u, quad); }
#end
#else
                // Columns past the last are masked in the end.
#repeat i 4
                let b_$i = widen(w[min(4u * quad + $iu, args.columns - 1u) * args.b_stride + step / 4u]);
#end
#endif
#repeat r 8
                {
                    let row = min(first_row + $ru, args.rows - 1u);
                    // What follows in the row is not of this dispatch, and need not be finite.
                    let v = select(vec4<f32>(0.0), a[row * args.a_stride + args.a_at + step / 4u], deep);
#if ACROSS_B
                    sum$r += v.x * b0 + v.y * b_0 + v.z * b_1 + v.w * b_2;
#else
                    sum$r += vec4<f32>(dot(b_0, v), dot(b_1, v), dot(b_2, v), dot(b_3, v));
#endif
                }
#end
            }
        }
#end
#endif
    }
#repeat r 8
    if (first_row + $ru < args.rows) { finish(first_row + $ru, quad, sum$r); }
#end
}
