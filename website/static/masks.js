// The mask sampler of wejepa/masking.py, and the published one's departures from it, one switch each.
"use strict";

wejepa.masks = (() => {
  /** A generator of numbers from 0 to 1 (mulberry32), so that a draw can be repeated. */
  function random(seed) {
    let a = seed >>> 0;
    return () => {
      a = (a + 0x6d2b79f5) | 0;
      let t = Math.imul(a ^ (a >>> 15), 1 | a);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  /**
   * Height and width of a block. With `tied`, one random number draws area and shape both, and the area is rounded down to whole
   * patches; with `exclusive`, a block is smaller than the grid: both as in the published sampler.
   */
  function blockShape(grid, scale, aspectRatio, rand, room, {tied, exclusive}) {
    const u = rand(), v = tied ? u : rand(), most = exclusive ? grid - 1 : grid;
    const share = scale[0] + u * (scale[1] - scale[0]), aspect = aspectRatio[0] + v * (aspectRatio[1] - aspectRatio[0]);
    const area = tied ? Math.floor(share * grid * grid) : share * grid * grid;
    let height = Math.min(Math.max(1, Math.round(Math.sqrt(area * aspect))), most);
    let width = Math.min(Math.max(1, Math.round(Math.sqrt(area / aspect))), most);
    while (height * width > room) height >= width ? height-- : width--;
    return [height, width];
  }

  /** The first row or column of a block of a length. With `exclusive`, the last place is left out, as randint(0, grid - length) does. */
  const corner = (grid, length, rand, exclusive) => Math.floor(rand() * Math.max(1, grid - length + (exclusive ? 0 : 1)));

  const rectangle = (grid, top, left, height, width) => {
    const places = [];
    for (let y = top; y < top + height; y++) for (let x = left; x < left + width; x++) places.push(y * grid + x);
    return places;
  };

  /**
   * The published sampler's context before the cut: what the targets leave of the large block. With LEAST patches or fewer it draws the
   * block again, and after every 20 vain draws it takes one target block less out, so that the student sees patches it must predict.
   */
  const LEAST = 10;
  function whatIsLeft(drawLarge, blocks) {
    for (let vain = 0; ; vain++) {
      const taken = Math.max(0, blocks.length - Math.floor(vain / 20)), gone = new Set(blocks.slice(0, taken).flat());
      const left = drawLarge().filter((p) => !gone.has(p));
      if (left.length > LEAST || !taken) return left;
    }
  }

  /**
   * Masks of a batch: {context: [places of each image], targets: [blocks of each image], block: [height, width]}.
   * settings: targetScale, targetAspect, contextScale, contextAspect, blocks, share.
   * bugs: exclusive (the last row and column are never drawn), cut (contexts keep all that is left, and are cut to the batch's shortest,
   * in raster order), tied.
   */
  function sample(batch, grid, settings, rand, bugs = {}) {
    const patches = grid * grid, size = Math.max(1, Math.round(settings.share * patches));
    const room = bugs.cut ? patches - 1 : patches - size;
    const [height, width] = blockShape(grid, settings.targetScale, settings.targetAspect, rand, room, bugs);
    const [high, wide] = blockShape(grid, settings.contextScale, settings.contextAspect, rand, patches, bugs);
    const context = [], targets = [];
    for (let b = 0; b < batch; b++) {
      const covered = new Uint8Array(patches), blocks = [];
      let count = 0;
      for (let m = 0; m < settings.blocks; m++) {
        let places = rectangle(grid, corner(grid, height, rand, bugs.exclusive), corner(grid, width, rand, bugs.exclusive), height, width);
        const fresh = places.reduce((sum, p) => sum + 1 - covered[p], 0);
        if (count + fresh > room) places = blocks[0] ?? places; // it would leave the context too little: repeat the first
        for (const p of places) {
          count += 1 - covered[p];
          covered[p] = 1;
        }
        blocks.push(places);
      }
      const large = () => rectangle(grid, corner(grid, high, rand, bugs.exclusive), corner(grid, wide, rand, bugs.exclusive), high, wide);
      if (bugs.cut) context.push(whatIsLeft(large, blocks));
      else {
        const inside = new Uint8Array(patches), free = [...Array(patches).keys()].filter((p) => !covered[p]);
        for (const p of large()) inside[p] = 1;
        const rank = free.map((p) => [rand() + inside[p], p]).sort((a, b) => b[0] - a[0]);
        context.push(rank.slice(0, size).map(([, p]) => p).sort((a, b) => a - b));
      }
      targets.push(blocks);
    }
    if (bugs.cut) {
      const shortest = Math.min(...context.map((c) => c.length));
      for (let b = 0; b < batch; b++) context[b] = context[b].slice(0, shortest);
    }
    return {context, targets, block: [height, width]};
  }

  return {random, sample};
})();
