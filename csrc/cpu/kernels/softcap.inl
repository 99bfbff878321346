// Soft-capping: y = cap tanh(x / cap), and dx = dy (1 - tanh^2). In fp32, rounded once.

inline Vec capped(Vec x, Vec cap) { return tanh(div(x, cap)); }

template <class T>
void softcap(const void* x_data, float cap, int64_t n, void* y_data) {
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  for_each_vec(n, [&](int64_t i, int64_t left) {
    store_up_to(y + i, mul(set1(cap), capped(load_up_to(x + i, left), set1(cap))), left);
  });
}

template <class T>
void softcap_backward(const void* dy_data, const void* x_data, float cap, int64_t n,
                      void* dx_data) {
  const T* dy = static_cast<const T*>(dy_data);
  const T* x = static_cast<const T*>(x_data);
  T* dx = static_cast<T*>(dx_data);
  const Vec one = set1(1.0f);
  for_each_vec(n, [&](int64_t i, int64_t left) {
    const Vec t = capped(load_up_to(x + i, left), set1(cap));
    const Vec slope = mul(sub(one, t), add(one, t));
    store_up_to(dx + i, mul(load_up_to(dy + i, left), slope), left);
  });
}
