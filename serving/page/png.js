// A mask as a PNG file of one bit a pixel. A canvas could write one, but browsers that guard
// against fingerprinting change what is read back from it, and a mask must be what was painted.

const SIGNATURE = Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10);
const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value >>> 0;
});

/** Returns the file of a mask: white where a byte of `painted`, row by row, is not 0. */
export async function maskFile(painted, width, height) {
  const stride = 1 + Math.ceil(width / 8); // every row begins with its filter, 0 for none
  const rows = new Uint8Array(stride * height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      if (painted[y * width + x]) rows[y * stride + 1 + (x >> 3)] |= 0x80 >> (x & 7);
    }
  }
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const data = new Uint8Array(await new Response(packed).arrayBuffer());
  const head = new DataView(new ArrayBuffer(13));
  head.setUint32(0, width);
  head.setUint32(4, height);
  head.setUint8(8, 1); // bits a pixel, and what follows: grey, deflate, filters, not interlaced
  const parts = [["IHDR", new Uint8Array(head.buffer)], ["IDAT", data], ["IEND", new Uint8Array()]];
  const chunks = parts.map(([name, bytes]) => chunk(name, bytes));
  return new Blob([SIGNATURE, ...chunks], { type: "image/png" });
}

function chunk(name, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(name), 4);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (const byte of bytes.subarray(4, 8 + data.length)) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  view.setUint32(8 + data.length, (crc ^ 0xffffffff) >>> 0);
  return bytes;
}
