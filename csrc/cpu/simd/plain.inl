// 4 floats at a time in the compiler's own vector type, which every processor has. Included inside the
// unnamed namespace of a file compiled without instruction set flags.

typedef float Float4 __attribute__((vector_size(16)));

struct Vec {
  Float4 v;
};

constexpr int W = 4;
constexpr int kTileRows = 3;
constexpr int kThinRows = 2;
constexpr int kThinColumns = 2;

inline Vec zero() { return {Float4{0, 0, 0, 0}}; }
inline Vec set1(float x) { return {Float4{x, x, x, x}}; }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// a < b ? yes : no; no where either is NaN.
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return {a.v < b.v ? yes.v : no.v}; }
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float lane_max(Vec a) {
  const float left = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float right = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return left > right ? left : right;
}

template <class T>
inline Vec load_part(const T* p, int64_t n) {
  Float4 v = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) v[i] = float(widen(p[i]));
  return {v};
}
template <class T>
inline Vec load(const T* p) {
  return load_part(p, W);
}
// to[0..3]: the sums of a, b, c and d.
inline void store_sums(float* to, Vec a, Vec b, Vec c, Vec d) {
  to[0] = sum(a);
  to[1] = sum(b);
  to[2] = sum(c);
  to[3] = sum(d);
}

inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
template <class T>
inline void store_part(T* p, Vec a, int64_t n) {
  for (int i = 0; i < n; ++i) p[i] = narrow<T>(a.v[i]);
}
template <class T>
inline void store(T* p, Vec a) {
  store_part(p, a, W);
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }

// W words of 4 bytes, bits flipped; a field of each, signed: what is left between the shifts.
struct Words {
  uint32_t v[W];
};
inline Words load_words(const uint8_t* p, int64_t n, uint32_t flipped) {
  Words words = {};
  std::memcpy(words.v, p, size_t(n) * sizeof(uint32_t));
  for (uint32_t& word : words.v) word ^= flipped;
  return words;
}
inline Vec signed_field(Words a, int left, int right) {
  Vec field;
  for (int i = 0; i < W; ++i) field.v[i] = float(int32_t(a.v[i] << left) >> right);
  return field;
}

inline Vec nearest(Vec a) {
  Vec r;
  for (int i = 0; i < W; ++i) r.v[i] = __builtin_nearbyintf(a.v[i]);
  return r;
}
inline Vec scale_by_power(Vec a, Vec n) {
  for (int i = 0; i < W; ++i) a.v[i] = __builtin_ldexpf(a.v[i], int(n.v[i]));
  return a;
}

// a[i] lane j to a[j] lane i.
inline void transpose(Vec (&a)[W]) {
  for (int i = 0; i < W; ++i) {
    for (int j = i + 1; j < W; ++j) {
      const float t = a[i].v[j];
      a[i].v[j] = a[j].v[i];
      a[j].v[i] = t;
    }
  }
}

// Whole lines of 64 bytes to where a line begins, past the caches where there is a way.
inline void stream_lines(char* to, const char* from, int64_t bytes) {
  std::memcpy(to, from, size_t(bytes));
}
