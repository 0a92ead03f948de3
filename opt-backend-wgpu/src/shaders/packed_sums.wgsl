// The sums of matvec.wgsl over quantized W. For few rows (PARTS) the codes of a group are summed first and scaled then;
// for many, each weight is expanded and serves them all.
#if TABLE
#if TREE
    set_levels(which);
#else
    set_levels(which, thread);
#endif
#endif
    let row_vectors = args.groups * args.group_vectors;
    let w_at = min(quad, last_quad) * 4u * row_vectors;
    let group_at = min(quad, last_quad) * args.groups;
#if ZEROS
#else
    let zero = zeros(which, 0u);
#endif
#if SHARED
    for (var k = lane; k < row_vectors; k += $LANESu) {
        let group = group_at + k / args.group_vectors;
#else
    for (var g = 0u; g < args.groups; g++) {
        let group = group_at + g;
#endif
        let scale = scales(which, group);
#if ZEROS
        let zero = zeros(which, group);
#endif
#if PARTS
#repeat r $ROWS
        var part$r = vec4<f32>(0.0);
        var all$r = 0.0;
#end
#else
        let offset = scale * zero;
#endif
#if SHARED
        {
#else
        for (var k = g * args.group_vectors; k < (g + 1u) * args.group_vectors; k++) {
#endif
            let va = vector(which, w_at + k);
            let vb = vector(which, w_at + row_vectors + k);
            let vc = vector(which, w_at + 2u * row_vectors + k);
            let vd = vector(which, w_at + 3u * row_vectors + k);
#repeat j $VECTOR
#repeat h $WORD_QUADS
            {
                let at = (k * $VECTORu + $ju) * $WORD_QUADSu + $hu;
                let ca = values(word(va, $ju) >> (16u * $hu));
                let cb = values(word(vb, $ju) >> (16u * $hu));
                let cc = values(word(vc, $ju) >> (16u * $hu));
                let cd = values(word(vd, $ju) >> (16u * $hu));
#if PARTS
#repeat r $ROWS
                {
                    let v = x[x$r + at];
#if TABLE
                    part$r += vec4<f32>(dot(ca, v), dot(cb, v), dot(cc, v), dot(cd, v));
#else
                    let u = v * PLACE;
                    part$r += vec4<f32>(dot(ca, u), dot(cb, u), dot(cc, u), dot(cd, u));
                    all$r += dot(v, vec4<f32>(1.0));
#endif
                }
#end
#else
#if TABLE
                let wa = ca * scale.x;
                let wb = cb * scale.y;
                let wc = cc * scale.z;
                let wd = cd * scale.w;
#else
                let wa = ca * (PLACE * scale.x) - offset.x;
                let wb = cb * (PLACE * scale.y) - offset.y;
                let wc = cc * (PLACE * scale.z) - offset.z;
                let wd = cd * (PLACE * scale.w) - offset.w;
#endif
#repeat r $ROWS
                {
                    let v = x[x$r + at];
                    sum$r += vec4<f32>(dot(wa, v), dot(wb, v), dot(wc, v), dot(wd, v));
                }
#end
#endif
            }
#end
#end
        }
#if PARTS
#repeat r $ROWS
#if TABLE
        sum$r += scale * part$r;
#else
        sum$r += scale * (part$r - zero * all$r);
#endif
#end
#endif
    }
