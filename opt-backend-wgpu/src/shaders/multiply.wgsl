// out = a b, or plus that: a workgroup computes a tile of 64 rows and 64 columns, a thread four rows and four columns
// next to each other, over sixteen steps of the depth at a time that all threads have copied to workgroup memory.
//
// A tile holds row (or column) 4 i + c of each step at c * 16 + i, and steps are 65 numbers apart, so that neither
// storing nor loading has many threads at one bank.
#include operands

const STEP: u32 = 65u;
var<workgroup> a_tile: array<f32, 1040>;
var<workgroup> b_tile: array<f32, 1040>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let id = group.y * groups.x + group.x;
    let first_row = id / args.column_groups * 64u;
    let first_column = id % args.column_groups * 64u;
    if (first_row >= args.rows) { return; }

#if TABLE
    set_levels(0u, thread);
#endif

    let tx = thread % 16u;
    let ty = thread / 16u;
    // What this thread copies of an operand that lies along the depth: a quad of one of 64 rows.
    let along = thread / 4u;
    let along_slot = along % 4u * 16u + along / 4u;
    let along_quad = thread % 4u;

#repeat r 4
    var sum$r = vec4<f32>(0.0);
#end
    for (var k = 0u; k < args.depth; k += 16u) {
        var av = vec4<f32>(0.0);
#if ACROSS_A
        if (k + ty < args.depth && first_row + 4u * tx < args.rows) {
            av = a[(k + ty) * args.a_stride + args.a_at + first_row / 4u + tx];
        }
#repeat c 4
        a_tile[ty * STEP + $cu * 16u + tx] = av[$c];
#end
#else
        let a_step = k + 4u * along_quad;
        if (a_step < args.depth && first_row + along < args.rows) {
            av = a[(first_row + along) * args.a_stride + args.a_at + a_step / 4u];
            // What follows in the row is not of this dispatch, and need not be finite.
            av = select(vec4<f32>(0.0), av, columns_from(a_step) < vec4<u32>(args.depth));
        }
#repeat c 4
        a_tile[(4u * along_quad + $cu) * STEP + along_slot] = av[$c];
#end
#endif
        var bv = vec4<f32>(0.0);
#if ACROSS_B
        if (k + ty < args.depth && first_column + 4u * tx < args.columns) {
            bv = b_quad(k + ty, first_column / 4u + tx);
        }
#repeat c 4
        b_tile[ty * STEP + $cu * 16u + tx] = bv[$c];
#end
#else
        let b_step = k + 4u * along_quad;
        if (b_step < args.depth && first_column + along < args.columns) {
            bv = widen(w[(first_column + along) * args.b_stride + b_step / 4u]);
        }
#repeat c 4
        b_tile[(4u * along_quad + $cu) * STEP + along_slot] = bv[$c];
#end
#endif
        workgroupBarrier();
        // Unrolled, also for llvmpipe, which ends all loops of a shader after 65,535 iterations in all.
#repeat d 16
        {
            let at = $du * STEP;
            let b = vec4<f32>(b_tile[at + tx], b_tile[at + 16u + tx], b_tile[at + 32u + tx], b_tile[at + 48u + tx]);
#repeat r 4
            sum$r += a_tile[at + $ru * 16u + ty] * b;
#end
        }
#end
        workgroupBarrier();
    }

    if (first_column + 4u * tx >= args.columns) { return; }
#repeat r 4
    if (first_row + 4u * ty + $ru < args.rows) { finish(first_row + 4u * ty + $ru, first_column / 4u + tx, sum$r); }
#end
}
